//! What rustix, socket2 and nix do not offer safely: `TCP_INFO` in full, the 64-bit `SO_MAX_PACING_RATE`, and close-on-exec for
//! descriptors that somebody else has opened.
//!
//! All `unsafe` of the relay is in this file.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

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
    // SAFETY: the pointer and the length describe `raw`, which outlives the call; the kernel writes at most `length` bytes and
    // any bytes are a valid [u8; 256].
    let answer = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            raw.as_mut_ptr().cast(),
            &mut length,
        )
    };
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
    // SAFETY: the pointer and the size describe a u64 that outlives the call; the kernel only reads it.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MAX_PACING_RATE,
            std::ptr::from_ref(&bytes_per_s).cast(),
            size_of::<u64>() as libc::socklen_t,
        )
    };
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    #[test]
    fn a_connection_that_moved_bytes_has_a_round_trip_a_window_and_busy_time() {
        let (mut near, mut far) = pair();
        near.write_all(&[7; 100_000]).unwrap();
        let mut got = vec![0; 100_000];
        far.read_exact(&mut got).unwrap();
        let info = tcp_info(&near).unwrap();
        assert!(info.rtt_us > 0 && info.rtt_us < 10_000_000, "{info:?}");
        assert!(info.cwnd_segments > 0 && info.mss_bytes > 500, "{info:?}");
        assert_eq!(info.notsent_bytes, 0);
    }

    #[test]
    fn a_reader_that_does_not_read_shows_as_busy_time_limited_by_the_receiver() {
        let (mut near, far) = pair();
        near.set_nonblocking(true).unwrap();
        let full = |near: &mut TcpStream| near.write(&[7; 100_000]).is_err();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            // The kernel counts in jiffies, and auto-tuning makes room again for a while.
            full(&mut near);
            let info = tcp_info(&near).unwrap();
            if info.receiver_limited_us > 0 && info.busy_us >= info.receiver_limited_us {
                break;
            }
            assert!(std::time::Instant::now() < deadline, "{info:?}");
            std::thread::yield_now();
        }
        drop(far);
    }

    #[test]
    fn pacing_above_the_32_bit_limit_reads_back_in_tcp_info() {
        let (mut near, mut far) = pair();
        set_max_pacing_rate(&near, 12_500_000_000).unwrap();
        near.write_all(&[7; 10_000]).unwrap();
        far.read_exact(&mut [0; 10_000]).unwrap();
        assert!(tcp_info(&near).unwrap().pacing_bytes_per_s <= 12_500_000_000);
        set_max_pacing_rate(&near, u64::MAX).unwrap();
    }

    #[test]
    fn a_file_is_an_error() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(tcp_info(&file).is_err());
        assert!(set_max_pacing_rate(&file, 1).is_err());
    }
}
