//! How a relay waits for the WAN of a stream that uses its rate up. What the far relay's kernel paces comes in lumps, of 64 KiB or
//! less, and each would wake this relay and the application behind it; a few at once cost little more than one.
//!
//! The kernel keeps them to itself (`SO_RCVLOWAT`) while a timer runs, and no longer. It says an end or a reset at once.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use s2ds_sys::set_receive_low_water;
use tokio::time::Sleep;

use crate::connection::Connection;
use crate::socket::TcpStream;

/// What comes in this time is waited for, in lumps, and no more than so many.
const GATHERED_S: f64 = 0.002;
const LUMP_BYTES: u32 = 65_536;
const MOST_LUMPS: u8 = 4;
/// Twice that. What comes before a pause of its producer is late by no more than this.
const PATIENCE: Duration = Duration::from_millis(4);

/// How much of what comes at this speed is to be waited for; 0 where it would be one lump, and nothing won.
pub fn worth_lumps(bytes_per_s: f64) -> u8 {
    let lumps = (bytes_per_s * GATHERED_S / f64::from(LUMP_BYTES)) as u8;
    if lumps < 2 { 0 } else { lumps.min(MOST_LUMPS) }
}

/// One wait for the WAN of a connection that gathers.
pub struct Gathering<'a> {
    wan: &'a TcpStream,
    connection: &'a Connection,
    /// While it is there the socket keeps silent about less.
    patience: Option<Pin<Box<Sleep>>>,
}

impl<'a> Gathering<'a> {
    /// Boxed, because an idle connection keeps no memory for it.
    pub fn if_wanted(wan: &'a TcpStream, connection: &'a Connection) -> Option<Box<Gathering<'a>>> {
        (connection.gathers() > 0).then(|| Box::new(Gathering { wan, connection, patience: None }))
    }

    /// As `poll_read_ready` of the socket, for as much as is gathered, or what there is after `PATIENCE`.
    pub fn poll_read_ready(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ready = self.wan.poll_read_ready(context);
        if ready.is_ready() {
            return ready;
        }
        if self.patience.is_none() {
            let least_bytes = u32::from(self.connection.gathers()) * LUMP_BYTES;
            if least_bytes == 0 || set_receive_low_water(self.wan, least_bytes).is_err() {
                return Poll::Pending;
            }
            self.patience = Some(Box::pin(tokio::time::sleep(PATIENCE)));
        }
        if self.patience.as_mut().is_some_and(|patience| patience.as_mut().poll(context).is_ready()) {
            // The rate is not used up any more: from here on nothing waits, until the pacer finds that it is.
            self.connection.gather(0);
            self.end();
        }
        Poll::Pending
    }

    /// The kernel says now what it has kept to itself.
    fn end(&mut self) {
        if self.patience.take().is_some() {
            let _ = set_receive_low_water(self.wan, 1);
        }
    }
}

impl Drop for Gathering<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::io::Write;
    use std::net::{Shutdown, TcpListener};
    use std::task::Waker;

    use rustix::event::{PollFd, PollFlags, Timespec};

    use super::*;
    use crate::config::Role;

    /// The WAN socket of a relay, its peer, and a connection that gathers one lump.
    fn pair() -> (TcpStream, std::net::TcpStream, Connection) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let wan = listener.accept().unwrap().0;
        wan.set_nonblocking(true).unwrap();
        let connection = Connection::new(1, 0, peer.local_addr().unwrap(), Role::Cons);
        connection.gather(1);
        (TcpStream::watched(wan).unwrap(), peer, connection)
    }

    fn in_a_runtime<T>(test: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let within = Duration::from_secs(60);
        runtime.block_on(async { tokio::time::timeout(within, test).await }).expect("in good time")
    }

    fn is_pending(gathering: &mut Gathering<'_>) -> bool {
        gathering.poll_read_ready(&mut Context::from_waker(Waker::noop())).is_pending()
    }

    /// What the kernel says within so many seconds, and nobody else.
    fn is_readable(wan: &TcpStream, within_s: i64) -> bool {
        let within = Timespec { tv_sec: within_s, tv_nsec: 0 };
        rustix::event::poll(&mut [PollFd::new(wan, PollFlags::IN)], Some(&within)).unwrap() > 0
    }

    #[test]
    fn it_is_worth_to_wait_for_what_two_milliseconds_bring_in_two_lumps_or_more() {
        let at = |mbits_per_s: f64| worth_lumps(mbits_per_s * 125_000.0);
        assert_eq!([at(0.0), at(100.0), at(500.0), at(550.0), at(1000.0), at(10_000.0)], [0, 0, 0, 2, 3, 4]);
    }

    #[test]
    fn less_than_a_connection_gathers_is_kept_back_and_enough_is_not() {
        in_a_runtime(async {
            let (wan, mut peer, connection) = pair();
            let mut gathering = Gathering::if_wanted(&wan, &connection).unwrap();
            assert!(is_pending(&mut gathering));
            peer.write_all(&[7; 1000]).unwrap();
            assert!(!is_readable(&wan, 0));
            peer.write_all(&[7; LUMP_BYTES as usize - 1000]).unwrap();
            assert!(is_readable(&wan, 60));
        });
    }

    #[test]
    fn an_end_is_not_kept_back() {
        in_a_runtime(async {
            let (wan, mut peer, connection) = pair();
            let mut gathering = Gathering::if_wanted(&wan, &connection).unwrap();
            assert!(is_pending(&mut gathering));
            peer.write_all(b"last").unwrap();
            peer.shutdown(Shutdown::Write).unwrap();
            assert!(is_readable(&wan, 60));
        });
    }

    #[test]
    fn what_stays_little_is_said_after_a_while_and_nothing_waits_behind_it() {
        in_a_runtime(async {
            let (wan, mut peer, connection) = pair();
            let mut gathering = Gathering::if_wanted(&wan, &connection).unwrap();
            assert!(is_pending(&mut gathering));
            peer.write_all(b"a message").unwrap();
            poll_fn(|context| gathering.poll_read_ready(context)).await.unwrap();
            assert_eq!(connection.gathers(), 0);
        });
    }

    #[test]
    fn a_wait_that_is_over_or_given_up_keeps_nothing_back() {
        in_a_runtime(async {
            let (wan, mut peer, connection) = pair();
            let mut gathering = Gathering::if_wanted(&wan, &connection).unwrap();
            assert!(is_pending(&mut gathering));
            peer.write_all(b"a message").unwrap();
            assert!(!is_readable(&wan, 0));
            drop(gathering);
            assert!(is_readable(&wan, 60));
        });
    }

    #[test]
    fn a_connection_that_gathers_nothing_waits_as_ever() {
        in_a_runtime(async {
            let (wan, _peer, connection) = pair();
            connection.gather(0);
            assert!(Gathering::if_wanted(&wan, &connection).is_none());
        });
    }
}
