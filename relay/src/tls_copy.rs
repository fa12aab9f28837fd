//! Carries the bytes of one connection in mode `tls`: TLS 1.3 on the WAN socket, clear text on the LAN socket, both ways in
//! one task because they share the session.

use std::io;

use tokio::io::{Interest, Ready};
use tokio::net::TcpStream;

use crate::connection::{Connection, Flow, Leg, LegError, Path, Wait, Waiting};
use crate::pipe::{give_buffer, take_buffer};
use crate::socket::{close_in_order, shutdown_write};
use crate::splice::FLUSH;
use crate::tls::{HEADER_BYTES, LONGEST_RECORD_BYTES, Session};

/// One round of either direction. Large enough to fill a send call, small enough to stay in the cache.
const CHUNK_BYTES: usize = 128 << 10;
/// As in `splice`; a round is smaller here, and dearer.
const ROUNDS_A_TURN: u64 = 8;

/// Relays until both sides have ended in order (FIN on the LAN, close_notify on the WAN) or the first error. A WAN that ends
/// without close_notify was cut, and counts as reset.
pub async fn relay(
    session: Session,
    lan: &TcpStream,
    wan: &TcpStream,
    connection: &Connection,
) -> Result<(), LegError> {
    connection.lan_to_wan().took(Path::TlsCopy, 0);
    connection.wan_to_lan().took(Path::TlsCopy, 0);
    let mut pump = Pump {
        session,
        inbox: Inbox::default(),
        delivered: 0,
        unsent: 0,
        lan_ended: false,
        lan_shut: false,
        wan_shut: false,
    };
    let mut rounds = 0_u64;
    while !(pump.lan_shut && pump.wan_shut) {
        let inward = pump.inward(lan, wan, connection)?;
        let outward = pump.outward(lan, wan, connection)?;
        if !inward && !outward {
            pump.wait(lan, wan, connection).await?;
        }
        // Also after a wait: one that is over at once must not keep the thread to itself.
        rounds += 1;
        if rounds % ROUNDS_A_TURN == 0 {
            tokio::task::yield_now().await;
        }
    }
    close_in_order(lan);
    close_in_order(wan);
    Ok(())
}

struct Pump {
    session: Session,
    inbox: Inbox,
    /// How much of `session.plain` the LAN has taken.
    delivered: usize,
    /// Plaintext bytes that `session.outgoing` stands for.
    unsent: usize,
    lan_ended: bool,
    lan_shut: bool,
    wan_shut: bool,
}

/// Ciphertext from the WAN: at most a part of one record between two rounds. It has memory only while it has bytes.
#[derive(Default)]
struct Inbox {
    buffer: Option<Vec<u8>>,
    length: usize,
}

impl Pump {
    /// WAN to LAN. Reads only when everything before has been delivered, so memory is bounded by one chunk.
    fn inward(
        &mut self,
        lan: &TcpStream,
        wan: &TcpStream,
        connection: &Connection,
    ) -> Result<bool, LegError> {
        let flow = connection.wan_to_lan();
        if self.delivered < self.session.plain.len() {
            let Some(moved) = at(Leg::Lan, lan.try_write(&self.session.plain[self.delivered..]))? else {
                return Ok(false);
            };
            self.delivered += moved;
            flow.add(moved);
            if self.delivered == self.session.plain.len() {
                self.session.plain.clear();
                self.delivered = 0;
            }
            return Ok(true);
        }
        if self.session.peer_closed {
            if !self.lan_shut {
                flow.end();
                shutdown_write(lan).map_err(|error| LegError::new(Leg::Lan, &error))?;
                self.lan_shut = true;
                return Ok(true);
            }
            return Ok(false);
        }
        let mut buffer = self.inbox.buffer.take().unwrap_or_else(take_buffer);
        let read =
            at(Leg::Wan, wan.try_read(&mut buffer[self.inbox.length..self.inbox.length + CHUNK_BYTES]));
        let progress = match read {
            // The far relay says close_notify or resets; only a network or a dying host ends like this.
            Ok(Some(0)) => Err(LegError::silent(Leg::Wan, "the WAN ended without close_notify")),
            Ok(Some(read)) => {
                self.inbox.length += read;
                match self.session.receive(&mut buffer[..self.inbox.length]) {
                    Ok(done) => {
                        buffer.copy_within(done..self.inbox.length, 0);
                        self.inbox.length -= done;
                        if !self.session.plain.is_empty() {
                            connection.first_byte();
                        }
                        Ok(true)
                    }
                    Err(error) => Err(LegError::tls(&error)),
                }
            }
            Ok(None) => Ok(false),
            Err(error) => Err(error),
        };
        if self.inbox.length == 0 {
            give_buffer(buffer);
        } else {
            debug_assert!(self.inbox.length < HEADER_BYTES + LONGEST_RECORD_BYTES);
            self.inbox.buffer = Some(buffer);
        }
        progress
    }

    /// LAN to WAN. Reads only when everything before has been sent.
    fn outward(
        &mut self,
        lan: &TcpStream,
        wan: &TcpStream,
        connection: &Connection,
    ) -> Result<bool, LegError> {
        let flow = connection.lan_to_wan();
        if !self.session.outgoing.is_empty() {
            let Some(moved) = at(Leg::Wan, wan.try_write(self.session.outgoing.pending()))? else {
                return Ok(false);
            };
            self.session.outgoing.sent(moved);
            if self.session.outgoing.is_empty() {
                flow.add(std::mem::take(&mut self.unsent));
            }
            return Ok(true);
        }
        if self.lan_ended {
            if !self.wan_shut {
                flow.end();
                shutdown_write(wan).map_err(|error| LegError::new(Leg::Wan, &error))?;
                self.wan_shut = true;
                return Ok(true);
            }
            return Ok(false);
        }
        let mut buffer = take_buffer();
        let progress = match at(Leg::Lan, lan.try_read(&mut buffer[..CHUNK_BYTES])) {
            Ok(Some(0)) => {
                self.lan_ended = true;
                self.session.send_close_notify().map(|()| true).map_err(|error| LegError::tls(&error))
            }
            Ok(Some(read)) => {
                connection.first_byte();
                self.unsent = read;
                self.session.send(&buffer[..read]).map(|()| true).map_err(|error| LegError::tls(&error))
            }
            Ok(None) => Ok(false),
            Err(error) => Err(error),
        };
        give_buffer(buffer);
        progress
    }

    /// Nothing could move: waits for what would change that, and on each leg for a reset even if nothing is wanted from it.
    async fn wait(
        &mut self,
        lan: &TcpStream,
        wan: &TcpStream,
        connection: &Connection,
    ) -> Result<(), LegError> {
        let to_lan = self.delivered < self.session.plain.len();
        let to_wan = !self.session.outgoing.is_empty();
        if !to_lan && !to_wan {
            // Idle connections cost two descriptors and a session, no buffers.
            self.session.outgoing.release();
            self.session.plain = Vec::new();
        }
        let _outward = waits(to_wan, self.lan_ended, connection.lan_to_wan());
        let _inward = waits(to_lan, self.session.peer_closed, connection.wan_to_lan());
        let lan_wants = wants(!to_wan && !self.lan_ended, to_lan);
        let wan_wants = wants(!to_lan && !self.session.peer_closed, to_wan);
        let (leg, ready) = tokio::select! {
            ready = lan.ready(lan_wants) => (Leg::Lan, ready),
            ready = wan.ready(wan_wants) => (Leg::Wan, ready),
        };
        let ready = ready.map_err(|error| LegError::new(leg, &error))?;
        let only_an_error =
            ready.is_error() && !wanted(ready, if leg == Leg::Lan { lan_wants } else { wan_wants });
        if !only_an_error {
            return Ok(());
        }
        if !to_lan && !to_wan {
            // It has ended its direction before, so nothing is read from it; and nothing is under way to the other one.
            return Err(LegError::new(leg, &rustix::io::Errno::CONNRESET.into()));
        }
        // This leg was reset while the other one is full: what is under way gets its bounded time.
        let (other, other_wants) = if leg == Leg::Lan { (wan, wan_wants) } else { (lan, lan_wants) };
        let rest = other_wants.remove(Interest::ERROR).unwrap_or(Interest::WRITABLE);
        match tokio::time::timeout(FLUSH, other.ready(rest)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(LegError::new(leg, &rustix::io::Errno::CONNRESET.into())),
        }
    }
}

/// What a direction waits for: room for what is under way, else the next bytes, unless it has ended.
fn waits(under_way: bool, ended: bool, flow: &Flow) -> Option<Waiting<'_>> {
    match (under_way, ended) {
        (true, _) => Some(flow.waits(Wait::Destination)),
        (false, false) => Some(flow.waits(Wait::Source)),
        (false, true) => None,
    }
}

fn wants(read: bool, write: bool) -> Interest {
    let mut interest = Interest::ERROR;
    if read {
        interest |= Interest::READABLE;
    }
    if write {
        interest |= Interest::WRITABLE;
    }
    interest
}

fn wanted(ready: Ready, interest: Interest) -> bool {
    (interest.is_readable() && (ready.is_readable() || ready.is_read_closed()))
        || (interest.is_writable() && (ready.is_writable() || ready.is_write_closed()))
}

/// None: the kernel has nothing, or no room, right now.
fn at(leg: Leg, answer: io::Result<usize>) -> Result<Option<usize>, LegError> {
    match answer {
        Ok(n) => Ok(Some(n)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
        Err(error) => Err(LegError::new(leg, &error)),
    }
}
