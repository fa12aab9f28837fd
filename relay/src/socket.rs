//! What every socket of a relay has in common: its options, how a worker watches it, exact reads and writes.

use std::future::Future;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, sockopt};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, Ready};

use crate::congestion::Congestion;
use crate::timer;

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

/// Throws away what has come and nobody wants to know, `most_bytes` of it: with that unread, closing would be a reset.
pub fn discard(socket: impl AsFd, most_bytes: usize) {
    // What has not come, or cannot be read, needs no throwing away.
    let _ = rustix::net::recv(socket, &mut vec![0; most_bytes], RecvFlags::DONTWAIT);
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

/// Who speaks first on a connection that is made.
pub enum First {
    /// The kernel lets the end of TCP's handshake wait for what we send: one segment in place of two, and whoever accepts finds
    /// something to read. `have_spoken` is to be called then.
    We,
    /// Perhaps the peer, who must hear of us at once.
    Anyone,
}

/// Behind the first word of `First::We`: whoever could not take it, as a SYN proxy, whose window is closed until it has heard of
/// the end of the handshake, hears of that now and not 200 ms later.
pub fn have_spoken(socket: impl AsFd) {
    for at_once in [true, false] {
        let _ = sockopt::set_tcp_quickack(&socket, at_once);
    }
}

/// Connects to a numeric address within `timeout`, from `source` if one is given. The error is the kernel's own (from connect
/// or SO_ERROR, never from poll flags) or TimedOut.
pub async fn connect(
    address: SocketAddr,
    source: Option<IpAddr>,
    timeout: Duration,
    congestion: &Congestion,
    first: First,
) -> io::Result<TcpStream> {
    let socket =
        Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    prepare(&socket)?;
    congestion.begin(&socket);
    if let First::We = first {
        // Where this is not to be had, there is one more segment.
        let _ = sockopt::set_tcp_quickack(&socket, false);
    }
    if let Some(source) = source {
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() != Some(Errno::INPROGRESS.raw_os_error()) => return Err(error),
        _ => {}
    }
    let stream = TcpStream::watched(socket.into())?;
    let ready = match timer::timeout(timeout, stream.ready(Interest::WRITABLE | Interest::ERROR)).await {
        Ok(ready) => ready?,
        Err(_) => return Err(io::ErrorKind::TimedOut.into()),
    };
    // A socket that has failed says so, some kernels even of one that has not: its own word counts.
    let failed = ready.is_error() || ready.is_write_closed();
    match if failed { stream.0.get_ref().take_error()? } else { None } {
        None => Ok(stream),
        Some(error) => Err(error),
    }
}

/// Everything that a socket is watched for.
const EVERYTHING: Interest = Interest::READABLE.add(Interest::WRITABLE).add(Interest::PRIORITY);

/// Has the runtime that this is called in watch a descriptor.
pub fn watched<T: AsRawFd>(descriptor: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // What the library warns of is a value that names another descriptor later. The types that this is called with never do, and
    // nobody can exchange what is watched; the form that it offers instead is unsafe.
    #[allow(deprecated)]
    AsyncFd::with_interest(descriptor, interest)
}

/// A connected socket and what the runtime of its worker knows of it. As the library's own, which does not hear of urgent bytes
/// and so has to read once more after each message.
pub struct TcpStream(AsyncFd<std::net::TcpStream>);

impl TcpStream {
    /// The socket is nonblocking; it belongs to the worker in whose runtime this is called.
    pub fn watched(socket: std::net::TcpStream) -> io::Result<TcpStream> {
        watched(socket, EVERYTHING).map(TcpStream)
    }

    /// To be watched by another worker.
    pub fn into_std(self) -> std::net::TcpStream {
        self.0.into_inner()
    }

    pub async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        Ok(self.0.ready(interest).await?.ready())
    }

    pub async fn readable(&self) -> io::Result<()> {
        self.ready(Interest::READABLE).await.map(drop)
    }

    pub async fn writable(&self) -> io::Result<()> {
        self.ready(Interest::WRITABLE).await.map(drop)
    }

    /// As `readable`, for one task at a time and without memory for it.
    pub fn poll_read_ready(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll_read_ready(context).map_ok(drop)
    }

    /// Calls if the socket is ready; it is so no more once the call would have had to wait.
    pub fn try_io<T>(&self, interest: Interest, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.0.try_io(interest, |_| call())
    }

    /// Reads by a call that takes `most_bytes` if there are so many. One that took fewer has emptied the socket, and the next one
    /// waits for more, unless an urgent byte or the end of the peer's direction may have stopped it.
    pub fn try_read_by(
        &self,
        most_bytes: usize,
        call: impl FnOnce() -> io::Result<usize>,
    ) -> io::Result<usize> {
        let mut taken = 0;
        let answer = self.try_io(Interest::READABLE, || {
            taken = call()?;
            let emptied = 0 < taken && taken < most_bytes && !self.has_priority();
            if emptied { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(taken) }
        });
        if taken > 0 { Ok(taken) } else { answer }
    }

    /// The library counts the end of the peer's direction in.
    fn has_priority(&self) -> bool {
        self.try_io(Interest::PRIORITY, || Ok(())).is_ok()
    }

    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.try_read_by(buffer.len(), || self.0.get_ref().read(buffer))
    }

    pub fn try_read_vectored(&self, slices: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let most_bytes = slices.iter().map(|slice| slice.len()).sum();
        self.try_read_by(most_bytes, || self.0.get_ref().read_vectored(slices))
    }

    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.try_io(Interest::WRITABLE, || self.0.get_ref().write(bytes))
    }

    pub fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.try_io(Interest::WRITABLE, || self.0.get_ref().write_vectored(slices))
    }

    /// Writes what `shutdown_write` follows at once: the kernel sends both in one segment.
    pub fn try_write_last(&self, bytes: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::NOSIGNAL | SendFlags::MORE;
        self.try_io(Interest::WRITABLE, || Ok(rustix::net::send(self, bytes, flags)?))
    }

    /// The peer's direction has ended in order: behind what is still to be read of it recv says 0, even after a reset
    /// (`SOCK_DONE`). Asked while there is something to read.
    pub fn has_ended(&self) -> bool {
        let ready = pin!(self.ready(Interest::READABLE | Interest::ERROR));
        let answer = ready.poll(&mut Context::from_waker(Waker::noop()));
        matches!(answer, Poll::Ready(Ok(ready)) if ready.is_read_closed() && !ready.is_error())
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.get_ref().local_addr()
    }
}

impl AsFd for TcpStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for TcpStream {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A listening socket; what it accepts is for any worker.
pub struct TcpListener(AsyncFd<std::net::TcpListener>);

impl TcpListener {
    /// The socket is nonblocking.
    pub fn watched(socket: std::net::TcpListener) -> io::Result<TcpListener> {
        watched(socket, EVERYTHING).map(TcpListener)
    }

    /// The next connection, nonblocking and watched by nobody, and where it comes from.
    pub async fn accept(&self) -> io::Result<(std::net::TcpStream, SocketAddr)> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (socket, source) = self
            .0
            .async_io(Interest::READABLE, |listener| Ok(rustix::net::acceptfrom_with(listener, flags)?))
            .await?;
        let source = source.and_then(|source| source.try_into().ok()).ok_or(Errno::CONNABORTED)?;
        Ok((socket.into(), source))
    }
}

impl AsFd for TcpListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
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
pub mod tests {
    use std::net::{Ipv4Addr, TcpListener as StdListener, TcpStream as StdStream};

    use tokio::runtime::{Builder, Runtime};

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    pub fn runtime() -> Runtime {
        let runtime = Builder::new_current_thread().enable_io().build().unwrap();
        let entered = runtime.enter();
        timer::start(timer::Clock::new().unwrap());
        drop(entered);
        runtime
    }

    /// A socket as a relay has it, and the peer.
    pub fn pair() -> (TcpStream, StdStream) {
        let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let near = StdStream::connect(listener.local_addr().unwrap()).unwrap();
        near.set_nonblocking(true).unwrap();
        let (far, _) = listener.accept().unwrap();
        far.set_read_timeout(Some(DEADLINE)).unwrap();
        (TcpStream::watched(near).unwrap(), far)
    }

    async fn within<T>(future: impl Future<Output = io::Result<T>>) -> T {
        timer::timeout(DEADLINE, future).await.expect("in time").unwrap()
    }

    /// Waits until so many bytes can be read, without reading them.
    async fn comes(stream: &TcpStream, count: usize) {
        let mut seen = [0; 64];
        while rustix::net::recv(stream, &mut seen, RecvFlags::PEEK | RecvFlags::DONTWAIT)
            .map_or(0, |(seen, _)| seen)
            < count
        {
            timer::sleep(Duration::from_millis(1)).await;
        }
    }

    #[test]
    fn a_read_that_takes_less_than_it_may_has_emptied_the_socket() {
        runtime().block_on(async {
            let (stream, mut peer) = pair();
            peer.write_all(b"first").unwrap();
            within(stream.readable()).await;
            let mut buffer = [0; 64];
            assert_eq!(stream.try_read(&mut buffer).unwrap(), 5);
            let asked = std::cell::Cell::new(false);
            let again = stream.try_read_by(64, || {
                asked.set(true);
                Ok(0)
            });
            assert_eq!(again.unwrap_err().kind(), io::ErrorKind::WouldBlock);
            assert!(!asked.get());
            peer.write_all(b"second").unwrap();
            within(stream.readable()).await;
            assert_eq!(stream.try_read(&mut buffer).unwrap(), 6);
        });
    }

    #[test]
    fn a_read_that_an_urgent_byte_may_have_stopped_is_followed_by_another() {
        runtime().block_on(async {
            let (stream, mut peer) = pair();
            peer.write_all(b"before").unwrap();
            rustix::net::send(&peer, b"!", SendFlags::OOB).unwrap();
            peer.write_all(b"after").unwrap();
            within(stream.ready(Interest::PRIORITY)).await;
            comes(&stream, 6).await;
            let mut buffer = [0; 64];
            assert_eq!(stream.try_read(&mut buffer).unwrap(), 6);
            let mut rest = Vec::new();
            while rest != b"after" {
                within(stream.readable()).await;
                match stream.try_read(&mut buffer) {
                    Ok(length) => rest.extend_from_slice(&buffer[..length]),
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                }
            }
        });
    }

    #[test]
    fn the_end_of_the_peer_is_seen_before_its_last_bytes_are_read_and_a_reset_is_no_end() {
        runtime().block_on(async {
            let (stream, mut peer) = pair();
            peer.write_all(b"last").unwrap();
            within(stream.readable()).await;
            assert!(!stream.has_ended());
            peer.shutdown(std::net::Shutdown::Write).unwrap();
            while !stream.has_ended() {
                tokio::task::yield_now().await;
            }
            let mut buffer = [0; 64];
            assert_eq!(stream.try_read(&mut buffer[..2]).unwrap(), 2);
            sockopt::set_socket_linger(&peer, Some(Duration::ZERO)).unwrap();
            drop(peer);
            within(stream.ready(Interest::ERROR)).await;
            assert_eq!(stream.try_read(&mut buffer).unwrap(), 2);
            assert_eq!(stream.try_read(&mut buffer).unwrap(), 0);

            let (stream, mut peer) = pair();
            peer.write_all(b"last").unwrap();
            sockopt::set_socket_linger(&peer, Some(Duration::ZERO)).unwrap();
            drop(peer);
            within(stream.ready(Interest::ERROR)).await;
            assert!(!stream.has_ended());
        });
    }

    #[test]
    fn the_last_bytes_and_the_end_are_one_segment() {
        runtime().block_on(async {
            let segments = |peer: &StdStream| s2ds_sys::tcp_info(peer).unwrap().received_segments;
            let (stream, mut peer) = pair();
            within(stream.writable()).await;
            assert_eq!(stream.try_write_last(b"last").unwrap(), 4);
            shutdown_write(&stream).unwrap();
            let mut all = Vec::new();
            peer.read_to_end(&mut all).unwrap();
            assert_eq!((all.as_slice(), segments(&peer)), (&b"last"[..], 1));
        });
    }

    #[test]
    fn what_nobody_wants_to_know_does_not_make_a_close_a_reset() {
        let ends = |wanted: bool| {
            runtime().block_on(async {
                let (stream, mut peer) = pair();
                peer.write_all(&[1; 24]).unwrap();
                comes(&stream, 24).await;
                if !wanted {
                    discard(&stream, 24);
                }
                shutdown_write(&stream).unwrap();
                close_in_order(&stream);
                drop(stream);
                // What a reset leaves of an end of file is an error, once.
                let mut rest = Vec::new();
                peer.read_to_end(&mut rest).and_then(|_| peer.take_error())
            })
        };
        assert!(matches!(ends(false), Ok(None)));
        assert!(!matches!(ends(true), Ok(None)));
    }

    /// Somebody who is connected to, and what that takes.
    fn listening() -> (StdListener, SocketAddr, Congestion) {
        let listener = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address, Congestion::of_this_system())
    }

    #[test]
    fn who_speaks_first_ends_the_handshake_with_its_first_word() {
        runtime().block_on(async {
            let (listener, address, congestion) = listening();
            let is_accepted_unheard = async |first| {
                let near = connect(address, None, DEADLINE, &congestion, first).await.unwrap();
                let unheard = listener.accept();
                write_all(&near, b"request").await.unwrap();
                let is_unheard = unheard.is_ok();
                let (mut far, _) = unheard.or_else(|_| listener.accept()).unwrap();
                far.set_read_timeout(Some(DEADLINE)).unwrap();
                far.set_nonblocking(false).unwrap();
                far.read_exact(&mut [0; 7]).unwrap();
                is_unheard
            };
            assert!(is_accepted_unheard(First::Anyone).await);
            // The kernel waits for the word for 40 ms and more, which this thread may be away for.
            let mut tries = 0;
            while is_accepted_unheard(First::We).await {
                tries += 1;
                assert!(tries < 100);
            }
        });
    }

    #[test]
    fn the_handshake_ends_at_once_if_the_first_word_could_not_leave() {
        runtime().block_on(async {
            let (listener, address, congestion) = listening();
            let near = connect(address, None, DEADLINE, &congestion, First::We).await.unwrap();
            have_spoken(&near);
            assert!(listener.accept().is_ok());
        });
    }

    #[test]
    fn what_is_accepted_has_every_option_of_its_listening_socket() {
        let listener = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        prepare(&listener).unwrap();
        watch(&listener, Duration::from_secs(30)).unwrap();
        listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        listener.listen(1).unwrap();
        let listener = StdListener::from(listener);
        let _near = StdStream::connect(listener.local_addr().unwrap()).unwrap();
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
