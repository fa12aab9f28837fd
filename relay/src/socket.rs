//! What every socket of a relay has in common, and exact reads and writes on shared streams.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;
use tokio::net::{TcpSocket, TcpStream};

use crate::congestion::Congestion;

/// A side that only receives has nothing unacknowledged, so TCP_USER_TIMEOUT alone would never find its peer gone. It asks
/// after a third of that time, and again and again; TCP_USER_TIMEOUT ends it then, in place of a number of probes.
const KEEPALIVES_A_TIMEOUT: u32 = 3;
/// What the kernel takes.
const KEEPALIVE_S: (u64, u64) = (1, 32767);

/// Prepares a data socket: before connect, and a listening one before it listens, because what is accepted inherits all of it.
///
/// SO_LINGER {on, 0} comes first and stays until an orderly close: whatever ends this process, SIGKILL included, the peer sees
/// a reset and never a clean end of a stream that was cut. No SO_RCVBUF or SO_SNDBUF: they would switch the kernel's
/// auto-tuning off.
pub fn prepare(socket: impl AsFd) -> io::Result<()> {
    sockopt::set_socket_linger(&socket, Some(Duration::ZERO))?;
    Ok(sockopt::set_tcp_nodelay(&socket, true)?)
}

/// Has the kernel find out that a peer is gone. Not being able to only makes it be noticed later, so it is no reason to refuse
/// a connection. A connected socket gets this once it lasts: most of what is short would pay for it and not live to need it.
pub fn watch(socket: impl AsFd, user_timeout: Duration) -> io::Result<()> {
    let pause = (user_timeout / KEEPALIVES_A_TIMEOUT).as_secs().clamp(KEEPALIVE_S.0, KEEPALIVE_S.1);
    let pause = Duration::from_secs(pause);
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, pause)?;
    sockopt::set_tcp_keepintvl(&socket, pause)?;
    sockopt::set_tcp_keepcnt(&socket, KEEPALIVES_A_TIMEOUT)?;
    Ok(sockopt::set_tcp_user_timeout(&socket, milliseconds(user_timeout))?)
}

/// A time-out as TCP_USER_TIMEOUT takes it: what is longer than its 24 days is 24 days.
pub fn milliseconds(timeout: Duration) -> u32 {
    u32::try_from(timeout.as_millis().min(i32::MAX as u128)).unwrap_or_default()
}

/// Lets the coming close be an orderly one: both directions have ended with the applications' own FIN.
pub fn close_in_order(socket: impl AsFd) {
    // ENOTCONN and the like mean that the peer is gone already; there is nothing left to keep.
    let _ = sockopt::set_socket_linger(socket, None);
}

/// The peer has ended its direction, or reset: seen without reading what is before that.
pub fn peer_has_closed(socket: impl AsFd) -> bool {
    let mut watched = [PollFd::new(&socket, PollFlags::RDHUP)];
    poll(&mut watched, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// The socket has failed: nothing more can be read or written in order.
pub fn has_failed(socket: impl AsFd) -> bool {
    let mut watched = [PollFd::new(&socket, PollFlags::empty())];
    poll(&mut watched, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// Forwards an end of file. ENOTCONN is no error: the peer has closed both ways already.
pub fn shutdown_write(socket: impl AsFd) -> io::Result<()> {
    match rustix::net::shutdown(socket, rustix::net::Shutdown::Write) {
        Ok(()) | Err(rustix::io::Errno::NOTCONN) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Connects to a numeric address within `timeout`, from `source` if one is given. The error is the kernel's own (from connect
/// or SO_ERROR, never from poll flags) or TimedOut.
pub async fn connect(
    address: SocketAddr,
    source: Option<IpAddr>,
    timeout: Duration,
    congestion: &Congestion,
) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    prepare(&socket)?;
    congestion.begin(&socket);
    if let Some(source) = source {
        socket.bind(SocketAddr::new(source, 0))?;
    }
    match tokio::time::timeout(timeout, socket.connect(address)).await {
        Ok(connected) => connected,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Reads what there is, at least one byte and at most `buffer.len()`. UnexpectedEof if the peer has ended.
pub async fn read(stream: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        stream.readable().await?;
        match stream.try_read(buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => return Ok(n),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Reads exactly `buffer.len()` bytes and not one more. UnexpectedEof if the peer ends before.
pub async fn read_exact(stream: &TcpStream, buffer: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        filled += read(stream, &mut buffer[filled..]).await?;
    }
    Ok(())
}

/// Writes all of `bytes`.
pub async fn write_all(stream: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn what_is_accepted_has_every_option_of_its_listening_socket() {
        let listener = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        prepare(&listener).unwrap();
        watch(&listener, Duration::from_secs(30)).unwrap();
        listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        listener.listen(1).unwrap();
        let listener = TcpListener::from(listener);
        let _near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        assert_eq!(sockopt::socket_linger(&far), Ok(Some(Duration::ZERO)));
        assert_eq!(sockopt::tcp_nodelay(&far), Ok(true));
        assert_eq!(sockopt::socket_keepalive(&far), Ok(true));
        assert_eq!(sockopt::tcp_keepidle(&far), Ok(Duration::from_secs(10)));
        assert_eq!(sockopt::tcp_keepintvl(&far), Ok(Duration::from_secs(10)));
        assert_eq!(sockopt::tcp_keepcnt(&far), Ok(KEEPALIVES_A_TIMEOUT));
        assert_eq!(sockopt::tcp_user_timeout(&far), Ok(30_000));
    }
}
