//! Every call of this crate against the running kernel.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use s2ds_sys::*;

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
    assert!(set_receive_low_water(&file, 1).is_err());
}

#[test]
fn what_the_peer_has_not_acknowledged_and_what_it_has_is_all_that_was_written() {
    let (mut near, mut far) = pair();
    let before = tcp_info(&near).unwrap().acked_bytes;
    near.write_all(&[7; 100_000]).unwrap();
    far.read_exact(&mut vec![0; 100_000]).unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        let acked = tcp_info(&near).unwrap().acked_bytes - before;
        let unacked = unacked_bytes(&near).unwrap();
        assert!(acked + unacked <= 100_000, "{acked} + {unacked}");
        if unacked == 0 {
            assert_eq!(tcp_info(&near).unwrap().acked_bytes - before, 100_000);
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{acked} + {unacked}");
        std::thread::yield_now();
    }
}

/// What they do with kernel TLS is tested on a kernel that has it, by the test `kernel_tls` of the relay.
#[test]
fn without_kernel_tls_its_calls_are_errors() {
    let (near, _far) = pair();
    assert!(tls_next_record(&near).is_err());
    assert!(send_tls_record(std::fs::File::open("/dev/null").unwrap(), 21, &[1, 0]).is_err());
}
