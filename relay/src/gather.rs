//! How a relay waits for the WAN of a stream that uses its rate up. What the far relay's kernel paces comes in lumps, of 64 KiB or
//! less, and each would wake this relay and the application behind it; a few at once cost little more than one.
//!
//! The kernel keeps them to itself (`SO_RCVLOWAT`) while a timer runs, and no longer. It says an end or a reset at once.

use std::future::Future;
use std::pin::Pin;
use std::task::Context;
use std::time::Duration;

use s2ds_sys::set_receive_low_water;

use crate::connection::Connection;
use crate::socket::TcpStream;
use crate::timer::{self, Sleep};

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

/// One wait for the WAN of a connection that gathers: while it is there, the kernel is silent about less.
pub struct Gathering<'a> {
    wan: &'a TcpStream,
    patience: Sleep,
}

impl<'a> Gathering<'a> {
    /// Boxed, because an idle connection keeps no memory for it. None: nothing is gathered.
    fn begin(wan: &'a TcpStream, connection: &Connection) -> Option<Box<Gathering<'a>>> {
        let least_bytes = u32::from(connection.gathers()) * LUMP_BYTES;
        (least_bytes > 0 && set_receive_low_water(wan, least_bytes).is_ok())
            .then(|| Box::new(Gathering { wan, patience: timer::sleep(PATIENCE) }))
    }
}

impl Drop for Gathering<'_> {
    /// The kernel says now what it has kept to itself.
    fn drop(&mut self) {
        let _ = set_receive_low_water(self.wan, 1);
    }
}

/// To be called whenever there is nothing to read and the task goes on waiting: begins to gather if that is wanted, and ends it
/// after `PATIENCE`.
pub fn gather<'a>(
    gathering: &mut Option<Box<Gathering<'a>>>,
    wan: &'a TcpStream,
    connection: &Connection,
    context: &mut Context<'_>,
) {
    if gathering.is_none() {
        *gathering = Gathering::begin(wan, connection);
    }
    if gathering.as_mut().is_some_and(|one| Pin::new(&mut one.patience).poll(context).is_ready()) {
        // The rate is not used up any more: from here on nothing waits, until the pacer finds that it is.
        connection.gather(0);
        *gathering = None;
    }
}

#[cfg(test)]
pub mod tests {
    use std::future::poll_fn;
    use std::io::Write;
    use std::net::{Shutdown, TcpStream as StdStream};

    use rustix::event::{PollFd, PollFlags, Timespec};

    use super::*;
    use crate::config::Role;
    use crate::socket::tests::{pair, runtime};

    /// A connection that gathers so many lumps.
    pub fn gathering_connection(peer: &StdStream, lumps: u8) -> Connection {
        let connection = Connection::new(1, 0, peer.local_addr().unwrap(), Role::Cons);
        connection.gather(lumps);
        connection
    }

    /// What the kernel says within so many seconds, and nobody else.
    pub fn is_readable(wan: &TcpStream, within_s: i64) -> bool {
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
        runtime().block_on(async {
            let (wan, mut peer) = pair();
            let _gathering = Gathering::begin(&wan, &gathering_connection(&peer, 1)).unwrap();
            peer.write_all(&[7; 1000]).unwrap();
            assert!(!is_readable(&wan, 0));
            peer.write_all(&[7; LUMP_BYTES as usize - 1000]).unwrap();
            assert!(is_readable(&wan, 60));
        });
    }

    #[test]
    fn an_end_is_not_kept_back() {
        runtime().block_on(async {
            let (wan, mut peer) = pair();
            let _gathering = Gathering::begin(&wan, &gathering_connection(&peer, 1)).unwrap();
            peer.write_all(b"last").unwrap();
            peer.shutdown(Shutdown::Write).unwrap();
            assert!(is_readable(&wan, 60));
        });
    }

    #[test]
    fn what_stays_little_is_said_after_a_while_and_nothing_waits_behind_it() {
        runtime().block_on(async {
            let (wan, mut peer) = pair();
            let connection = gathering_connection(&peer, 1);
            let mut gathering = None;
            let mut has_begun = false;
            let wait = poll_fn(|context| {
                let ready = wan.poll_read_ready(context);
                if ready.is_pending() {
                    gather(&mut gathering, &wan, &connection, context);
                    if !std::mem::replace(&mut has_begun, true) {
                        assert!(gathering.is_some());
                        peer.write_all(b"a message").unwrap();
                    }
                }
                ready
            });
            timer::timeout(Duration::from_secs(60), wait).await.expect("in good time").unwrap();
            assert_eq!(connection.gathers(), 0);
        });
    }

    #[test]
    fn a_wait_that_is_over_or_given_up_keeps_nothing_back() {
        runtime().block_on(async {
            let (wan, mut peer) = pair();
            let gathering = Gathering::begin(&wan, &gathering_connection(&peer, 1)).unwrap();
            peer.write_all(b"a message").unwrap();
            assert!(!is_readable(&wan, 0));
            drop(gathering);
            assert!(is_readable(&wan, 60));
        });
    }

    #[test]
    fn a_connection_that_gathers_nothing_waits_as_ever() {
        runtime().block_on(async {
            let (wan, peer) = pair();
            assert!(Gathering::begin(&wan, &gathering_connection(&peer, 0)).is_none());
        });
    }
}
