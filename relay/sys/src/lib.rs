//! What rustix, socket2 and nix do not offer safely: `TCP_INFO` in full, `SO_RCVLOWAT`, the 64-bit `SO_MAX_PACING_RATE`,
//! close-on-exec for descriptors that somebody else has opened, and of kernel TLS what goes beyond its keys.
//!
//! All `unsafe` of the relay is in this file.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// What `TCP_INFO` says of one socket. Units are in the names; a field the running kernel does not know is 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct TcpInfo {
    pub rtt_us: u32,
    pub rtt_var_us: u32,
    pub min_rtt_us: u32,
    /// Smoothed round trip as a pure receiver sees it.
    pub receive_rtt_us: u32,
    pub cwnd_segments: u32,
    pub mss_bytes: u32,
    pub lost_segments: u32,
    /// Over the life of the connection.
    pub retransmits: u32,
    pub pacing_bytes_per_s: u64,
    pub delivery_bytes_per_s: u64,
    /// Time with data outstanding; the two that follow are parts of it.
    pub busy_us: u64,
    pub receiver_limited_us: u64,
    pub send_buffer_limited_us: u64,
    pub notsent_bytes: u32,
    /// Over the life of the connection, by the peer.
    pub acked_bytes: u64,
    /// What the kernel takes for the peer's full segment.
    pub receive_mss_bytes: u32,
    /// Over the life of the connection, received in order; and in how many segments.
    pub received_bytes: u64,
    pub received_segments: u32,
    /// Since the peer's last acknowledgement of anything.
    pub last_ack_ms: u32,
    /// Probes of a closed window that the peer has not answered.
    pub unanswered_probes: u8,
    /// What the peer is ready to take; None before Linux 5.4.
    pub send_window_bytes: Option<u32>,
}

/// Offsets in `struct tcp_info` of `linux/tcp.h`. The structure only ever grows at its end, so an offset is good for ever;
/// an older kernel returns fewer bytes.
mod at {
    pub const PROBES: usize = 3;
    pub const SND_MSS: usize = 16;
    pub const RCV_MSS: usize = 20;
    pub const LOST: usize = 32;
    pub const LAST_ACK_RECV: usize = 56;
    pub const RTT: usize = 68;
    pub const RTTVAR: usize = 72;
    pub const SND_CWND: usize = 80;
    pub const RCV_RTT: usize = 92;
    pub const TOTAL_RETRANS: usize = 100;
    pub const PACING_RATE: usize = 104;
    pub const BYTES_ACKED: usize = 120;
    pub const BYTES_RECEIVED: usize = 128;
    pub const NOTSENT_BYTES: usize = 144;
    pub const MIN_RTT: usize = 148;
    pub const DATA_SEGS_IN: usize = 152;
    pub const DELIVERY_RATE: usize = 160;
    pub const BUSY_TIME: usize = 168;
    pub const RWND_LIMITED: usize = 176;
    pub const SNDBUF_LIMITED: usize = 184;
    pub const SND_WND: usize = 228;
}

/// Reads `TCP_INFO`. Fails with the kernel's error on anything that is not a TCP socket.
pub fn tcp_info(socket: impl AsFd) -> io::Result<TcpInfo> {
    let mut raw = [0u8; 256];
    let mut length = raw.len() as libc::socklen_t;
    let (fd, to) = (socket.as_fd().as_raw_fd(), raw.as_mut_ptr().cast());
    // SAFETY: the pointer and the length describe `raw`, which outlives the call; the kernel writes at most `length` bytes and
    // any bytes are a valid [u8; 256].
    let answer = unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, to, &mut length) };
    if answer != 0 {
        return Err(io::Error::last_os_error());
    }
    let word = |offset: usize| u32::from_ne_bytes(raw[offset..offset + 4].try_into().unwrap_or_default());
    let long = |offset: usize| u64::from_ne_bytes(raw[offset..offset + 8].try_into().unwrap_or_default());
    Ok(TcpInfo {
        rtt_us: word(at::RTT),
        rtt_var_us: word(at::RTTVAR),
        min_rtt_us: word(at::MIN_RTT),
        receive_rtt_us: word(at::RCV_RTT),
        cwnd_segments: word(at::SND_CWND),
        mss_bytes: word(at::SND_MSS),
        lost_segments: word(at::LOST),
        retransmits: word(at::TOTAL_RETRANS),
        pacing_bytes_per_s: long(at::PACING_RATE),
        delivery_bytes_per_s: long(at::DELIVERY_RATE),
        busy_us: long(at::BUSY_TIME),
        receiver_limited_us: long(at::RWND_LIMITED),
        send_buffer_limited_us: long(at::SNDBUF_LIMITED),
        notsent_bytes: word(at::NOTSENT_BYTES),
        acked_bytes: long(at::BYTES_ACKED),
        receive_mss_bytes: word(at::RCV_MSS),
        received_bytes: long(at::BYTES_RECEIVED),
        received_segments: word(at::DATA_SEGS_IN),
        last_ack_ms: word(at::LAST_ACK_RECV),
        unanswered_probes: raw[at::PROBES],
        send_window_bytes: (length as usize >= at::SND_WND + 4).then(|| word(at::SND_WND)),
    })
}

/// Sets the kernel's pacing of one socket in bytes per second; `u64::MAX` is unlimited. The 32-bit form of the option ends
/// at 34 Gbit/s, so only the 64-bit one is offered (Linux 4.20 and later).
pub fn set_max_pacing_rate(socket: impl AsFd, bytes_per_s: u64) -> io::Result<()> {
    set_option(socket.as_fd(), libc::SO_MAX_PACING_RATE, &bytes_per_s.to_ne_bytes())
}

/// A socket cannot be read, for whoever waits for that, before so many bytes are there, or the peer's end. If they are, the
/// kernel says so anew; newer ones also if the peer's window has no room for them.
pub fn set_receive_low_water(socket: impl AsFd, bytes: u32) -> io::Result<()> {
    set_option(socket.as_fd(), libc::SO_RCVLOWAT, &bytes.to_ne_bytes())
}

fn set_option(socket: BorrowedFd<'_>, option: libc::c_int, value: &[u8]) -> io::Result<()> {
    let (from, length) = (value.as_ptr().cast(), value.len() as libc::socklen_t);
    // SAFETY: the pointer and the length describe `value`, which outlives the call; the kernel only reads it.
    let answer = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, from, length) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Marks every descriptor from `first` on as close-on-exec, whatever it is: a program started next inherits none of them.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: the call takes three numbers and changes a flag of open descriptors; it neither closes nor writes anything.
    let answer = unsafe {
        libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_uint)
    };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Bytes that this TCP socket has taken and its peer has not acknowledged.
pub fn unacked_bytes(socket: impl AsFd) -> io::Result<u64> {
    let mut count: libc::c_int = 0;
    // SAFETY: SIOCOUTQ (TIOCOUTQ by its older name) writes one c_int, to which the pointer leads.
    let answer = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &mut count) };
    if answer == 0 { Ok(count.max(0) as u64) } else { Err(io::Error::last_os_error()) }
}

/// How many records kernel TLS has encrypted under its present key, of ChaCha20-Poly1305 or AES-256-GCM: the number of the
/// next one.
pub fn tls_next_record(socket: impl AsFd) -> io::Result<u64> {
    // Their structures in `linux/tls.h` are of one size, and end with the number; the kernel fails for any other.
    let mut key = [0u8; size_of::<libc::tls12_crypto_info_chacha20_poly1305>()];
    let mut length = key.len() as libc::socklen_t;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the pointer and the length describe `key`, which outlives the call; the kernel writes at most `length` bytes and
    // any bytes are a valid [u8; _].
    let answer =
        unsafe { libc::getsockopt(fd, libc::SOL_TLS, libc::TLS_TX, key.as_mut_ptr().cast(), &mut length) };
    if answer != 0 {
        return Err(io::Error::last_os_error());
    }
    let number = key.last_chunk().map_or(0, |number| u64::from_be_bytes(*number));
    // It is a key: nothing of it stays here.
    std::hint::black_box(&mut key).fill(0);
    Ok(number)
}

/// Sends one record of another type than data over kernel TLS, without waiting; how many of `bytes` were taken.
pub fn send_tls_record(socket: impl AsFd, content_type: u8, bytes: &[u8]) -> io::Result<usize> {
    // A header of 16 bytes and one byte, aligned as the kernel wants it.
    let mut control = [0u64; 3];
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: all zero is a valid msghdr. Its pointers lead to `part`, which describes `bytes`, and to `control`, which has
    // room for CMSG_SPACE(1) = 24 bytes, so CMSG_FIRSTHDR is not null; all outlive the call, which only reads them.
    let sent = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_TLS;
        (*header).cmsg_type = libc::TLS_SET_RECORD_TYPE;
        (*header).cmsg_len = libc::CMSG_LEN(1) as _;
        *libc::CMSG_DATA(header) = content_type;
        libc::sendmsg(socket.as_fd().as_raw_fd(), &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}
