//! Carries the bytes of one connection in mode `tls`: TLS 1.3 on the WAN socket, clear text on the LAN socket, both ways in
//! one task because they share the session. What the kernel gave into a buffer is sealed or opened there, and given on.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::AlertDescription;
use tokio::io::{Interest, Ready};

use crate::connection::{Connection, Flow, Leg, LegError, Legs, Path, Wait, Waiting};
use crate::pipe::{BUFFER_BYTES, give_buffer, take_buffer};
use crate::record::{ALERT_BYTES, Content, Fault, Records, length_of_first, slots};
use crate::socket::{TcpStream, close_in_order, shutdown_write};
use crate::splice::FLUSH;
use crate::timer::{self, Sleep};
use crate::tls::{HEADER_BYTES, LONGEST_RECORD_BYTES, Session};

/// As in `splice`; a round is smaller here, and dearer.
const ROUNDS_A_TURN: u8 = 8;
/// Part of a record is moved to the front of its buffer when there is less room than this behind it.
const LEAST_ROOM_BYTES: usize = BUFFER_BYTES / 2;
/// Less than this is moved up to what comes before it: a piece of its own costs a call more than so many bytes.
const LEAST_PIECE_BYTES: usize = 2048;
/// Of so many pieces one call takes care.
const PIECES_A_CALL: usize = 32;

/// Between two waits: what carries less has no use for keeping what it can make again from its keys.
const BULK_BYTES: u64 = 64 << 10;
/// What carries more keeps it for so long.
const AWAKE: Duration = Duration::from_secs(1);

/// Relays until both sides have ended in order (FIN on the LAN, close_notify on the WAN) or the first error. A WAN that ends
/// without close_notify was cut, and counts as reset.
pub fn relay<'a>(
    pump: &'a mut Pump,
    legs: &'a Legs,
    connection: &'a Connection,
) -> impl Future<Output = Result<(), LegError>> + 'a {
    connection.lan_to_wan().took(Path::TlsCopy, 0);
    connection.wan_to_lan().took(Path::TlsCopy, 0);
    // A block: an idle connection would keep the arguments of an async function twice.
    async move {
        let mut rounds = 0;
        while !(pump.lan_shut && pump.wan_shut) {
            let inward = pump.inward(&legs.lan, &legs.wan, connection)?;
            let outward = pump.outward(&legs.lan, &legs.wan, connection)?;
            if !inward && !outward {
                pump.rest_if_little(connection);
                if pump.is_idle() {
                    let _outward = connection.lan_to_wan().waits(Wait::Source);
                    let _inward = connection.wan_to_lan().waits(Wait::Source);
                    let mut awake = pump.records.is_awake().then(|| Box::pin(timer::sleep(AWAKE)));
                    poll_fn(|context| {
                        let ready = pump.poll_bytes(legs, &mut awake, context);
                        if ready.is_pending() {
                            rounds = 0; // the others have their turn
                        }
                        ready
                    })
                    .await?;
                } else {
                    // Boxed: an idle connection keeps no memory for it.
                    Box::pin(pump.wait(&legs.lan, &legs.wan, connection)).await?;
                }
            }
            // Also after a wait: one that is over at once must not keep the thread to itself.
            rounds += 1;
            if rounds == ROUNDS_A_TURN {
                rounds = 0;
                tokio::task::yield_now().await;
            }
        }
        close_in_order(&legs.lan);
        close_in_order(&legs.wan);
        Ok(())
    }
}

/// An idle connection has its keys and no buffer.
pub struct Pump {
    records: Records,
    inbox: Option<Box<Inbox>>,
    outbox: Option<Box<Outbox>>,
    lan_ended: bool,
    wan_ended: bool,
    lan_shut: bool,
    wan_shut: bool,
    carried_before_wait: u64,
}

/// What came from the WAN: opened pieces for the LAN, and then at most a part of one record.
struct Inbox {
    buffer: Vec<u8>,
    /// In the order of the stream, none of them empty.
    pieces: Vec<Range<usize>>,
    /// So many of the pieces the LAN has taken.
    delivered: usize,
    /// What is not opened yet.
    sealed: Range<usize>,
}

/// Records for the WAN.
struct Outbox {
    buffer: Vec<u8>,
    unsent: Range<usize>,
    /// How many bytes of the LAN are in them.
    content_bytes: usize,
}

impl Inbox {
    fn take() -> Inbox {
        Inbox { buffer: take_buffer(), pieces: Vec::new(), delivered: 0, sealed: 0..0 }
    }

    fn has_pieces(&self) -> bool {
        self.delivered < self.pieces.len()
    }

    /// Where the next bytes of the WAN go. Only while there are no pieces. There is always room for the rest of a record.
    fn room(&mut self) -> &mut [u8] {
        if self.buffer.len() - self.sealed.end < LEAST_ROOM_BYTES {
            self.buffer.copy_within(self.sealed.clone(), 0);
            self.sealed = 0..self.sealed.len();
        }
        &mut self.buffer[self.sealed.end..]
    }

    /// Opens every whole record; true if the peer's direction has ended in order.
    fn open(&mut self, records: &mut Records) -> Result<bool, Fault> {
        while let Some(length) = length_of_first(&self.buffer[self.sealed.clone()])? {
            if self.sealed.len() < length {
                break;
            }
            let record = self.sealed.start..self.sealed.start + length;
            self.sealed.start = record.end;
            match records.open(&mut self.buffer[record.clone()])? {
                Content::Data(length) => self.add(record.start + HEADER_BYTES, length),
                Content::Nothing => {}
                Content::CloseNotify => {
                    self.sealed = 0..0;
                    return Ok(true);
                }
            }
        }
        debug_assert!(self.sealed.len() < HEADER_BYTES + LONGEST_RECORD_BYTES);
        Ok(false)
    }

    fn add(&mut self, start: usize, length: usize) {
        match self.pieces.last_mut() {
            Some(last) if length < LEAST_PIECE_BYTES => {
                self.buffer.copy_within(start..start + length, last.end);
                last.end += length;
            }
            _ if length > 0 => self.pieces.push(start..start + length),
            _ => {}
        }
    }

    /// Gives the LAN what it takes in one call. `last`: the end of this direction follows the last piece at once.
    fn deliver(&mut self, lan: &TcpStream, last: bool) -> io::Result<usize> {
        let undelivered = &self.pieces[self.delivered..];
        let moved = match undelivered {
            [piece] if last => lan.try_write_last(&self.buffer[piece.clone()])?,
            _ => {
                let mut slices = [IoSlice::new(&[]); PIECES_A_CALL];
                for (slice, piece) in slices.iter_mut().zip(undelivered) {
                    *slice = IoSlice::new(&self.buffer[piece.clone()]);
                }
                lan.try_write_vectored(&slices[..undelivered.len().min(PIECES_A_CALL)])?
            }
        };
        let mut left = moved;
        while left > 0 {
            let piece = &mut self.pieces[self.delivered];
            let taken = left.min(piece.len());
            piece.start += taken;
            left -= taken;
            if Range::is_empty(piece) {
                self.delivered += 1;
            }
        }
        if !self.has_pieces() {
            self.pieces.clear();
            self.delivered = 0;
        }
        Ok(moved)
    }
}

impl Pump {
    /// Goes on where a session stands that may have received data already, and may have to send some.
    pub fn of(mut session: Session) -> Result<Pump, rustls::Error> {
        let (plain, outgoing) = (std::mem::take(&mut session.plain), session.outgoing.pending().to_vec());
        let wan_ended = session.peer_closed;
        let mut pump = Pump {
            records: Records::of(session)?,
            inbox: None,
            outbox: None,
            lan_ended: false,
            wan_ended,
            lan_shut: false,
            wan_shut: false,
            carried_before_wait: 0,
        };
        if !plain.is_empty() {
            let mut inbox = Inbox { buffer: plain, pieces: Vec::new(), delivered: 0, sealed: 0..0 };
            inbox.add(0, inbox.buffer.len());
            pump.inbox = Some(Box::new(inbox));
        }
        if !outgoing.is_empty() {
            let unsent = 0..outgoing.len();
            pump.outbox = Some(Box::new(Outbox { buffer: outgoing, unsent, content_bytes: 0 }));
        }
        Ok(pump)
    }

    fn to_lan(&self) -> bool {
        self.inbox.as_ref().is_some_and(|inbox| inbox.has_pieces())
    }

    /// WAN to LAN. Reads only when everything before has been delivered, so memory is bounded by one buffer.
    fn inward(
        &mut self,
        lan: &TcpStream,
        wan: &TcpStream,
        connection: &Connection,
    ) -> Result<bool, LegError> {
        let flow = connection.wan_to_lan();
        if let Some(inbox) = self.inbox.as_mut().filter(|inbox| inbox.has_pieces()) {
            let moved = at(Leg::Lan, inbox.deliver(lan, self.wan_ended))?;
            flow.add(moved.unwrap_or(0));
            self.give_back_inbox();
            // The end that goes with the last piece follows it here, before anything else can.
            if !self.wan_ended || self.to_lan() {
                return Ok(moved.is_some());
            }
        }
        if self.wan_ended {
            if !self.lan_shut {
                flow.end();
                shutdown_write(lan).map_err(|error| LegError::new(Leg::Lan, &error))?;
                self.lan_shut = true;
                return Ok(true);
            }
            return Ok(false);
        }
        let inbox = self.inbox.get_or_insert_with(|| Box::new(Inbox::take()));
        let progress = match at(Leg::Wan, wan.try_read(inbox.room())) {
            // The far relay says close_notify or resets; only a network or a dying host ends like this.
            Ok(Some(0)) => Err(LegError::silent(Leg::Wan, "the WAN ended without close_notify")),
            Ok(Some(read)) => {
                inbox.sealed.end += read;
                let opened = inbox.open(&mut self.records);
                if inbox.has_pieces() {
                    connection.first_byte();
                }
                match opened {
                    Ok(ended) => {
                        self.wan_ended = ended;
                        Ok(true)
                    }
                    Err(fault) => {
                        // What was in order before it arrives, as far as the LAN takes it now.
                        while inbox.has_pieces() {
                            let Ok(moved) = inbox.deliver(lan, false) else { break };
                            flow.add(moved);
                        }
                        self.tell(&fault, wan);
                        Err(LegError::tls(&fault.error))
                    }
                }
            }
            Ok(None) => Ok(false),
            Err(error) => Err(error),
        };
        self.give_back_inbox();
        progress
    }

    /// An inbox without bytes has no buffer.
    fn give_back_inbox(&mut self) {
        if let Some(inbox) = self.inbox.take_if(|inbox| !inbox.has_pieces() && inbox.sealed.is_empty()) {
            give_buffer(inbox.buffer);
        }
    }

    /// Says why the session is over, if that is possible now: not within a record that is being sent.
    fn tell(&mut self, fault: &Fault, wan: &TcpStream) {
        if let (Some(alert), None, false) = (fault.alert, &self.outbox, self.lan_ended) {
            if let Ok(record) = self.records.seal_alert(alert) {
                let _ = wan.try_write(&record);
            }
        }
    }

    /// LAN to WAN. Reads only when everything before has been sent.
    fn outward(
        &mut self,
        lan: &TcpStream,
        wan: &TcpStream,
        connection: &Connection,
    ) -> Result<bool, LegError> {
        let flow = connection.lan_to_wan();
        if let Some(outbox) = &mut self.outbox {
            // The FIN is a call away, and goes with close_notify.
            let unsent = &outbox.buffer[outbox.unsent.clone()];
            let sent = if self.lan_ended { wan.try_write_last(unsent) } else { wan.try_write(unsent) };
            let Some(moved) = at(Leg::Wan, sent)? else {
                return Ok(false);
            };
            outbox.unsent.start += moved;
            if let Some(sent) = self.outbox.take_if(|outbox| outbox.unsent.is_empty()) {
                flow.add(sent.content_bytes);
                give_buffer(sent.buffer);
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
        let unsent = match at(Leg::Lan, lan.try_read_vectored(&mut slots(&mut buffer))) {
            Ok(Some(0)) => {
                self.lan_ended = true;
                self.records.seal_alert(AlertDescription::CloseNotify).map(|record| {
                    buffer[..ALERT_BYTES].copy_from_slice(&record);
                    Some((0..ALERT_BYTES, 0))
                })
            }
            Ok(Some(read)) => {
                connection.first_byte();
                self.records.seal_data(&mut buffer, read).map(|unsent| Some((unsent, read)))
            }
            Ok(None) => Ok(None),
            Err(error) => {
                give_buffer(buffer);
                return Err(error);
            }
        };
        match unsent.map_err(|error| LegError::tls(&error))? {
            Some((unsent, content_bytes)) => {
                self.outbox = Some(Box::new(Outbox { buffer, unsent, content_bytes }));
                Ok(true)
            }
            None => {
                give_buffer(buffer);
                Ok(false)
            }
        }
    }

    /// Nothing is under way, and nobody has ended.
    fn is_idle(&self) -> bool {
        self.outbox.is_none() && !self.to_lan() && !self.lan_ended && !self.wan_ended
    }

    /// Before a wait: who has carried little since the last one keeps nothing that it can make again.
    fn rest_if_little(&mut self, connection: &Connection) {
        let carried = connection.bytes();
        let under_way = self.to_lan() || self.outbox.is_some();
        if !under_way && carried - self.carried_before_wait < BULK_BYTES {
            self.records.rest();
        }
        self.carried_before_wait = carried;
    }

    /// Waits for the next bytes, from either side, and rests once it has been `awake` for long. Nobody else waits for these
    /// sockets to be readable; `ready()` would take memory for that, of every idle connection.
    fn poll_bytes(
        &mut self,
        legs: &Legs,
        awake: &mut Option<Pin<Box<Sleep>>>,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), LegError>> {
        for leg in [Leg::Lan, Leg::Wan] {
            if let Poll::Ready(ready) = legs[leg].poll_read_ready(context) {
                return Poll::Ready(ready.map_err(|error| LegError::new(leg, &error)));
            }
        }
        if awake.as_mut().is_some_and(|sleep| sleep.as_mut().poll(context).is_ready()) {
            *awake = None;
            self.records.rest();
        }
        Poll::Pending
    }

    /// Nothing could move: waits for what would change that, and on each leg for a reset even if nothing is wanted from it.
    async fn wait(
        &mut self,
        lan: &TcpStream,
        wan: &TcpStream,
        connection: &Connection,
    ) -> Result<(), LegError> {
        let (to_lan, to_wan) = (self.to_lan(), self.outbox.is_some());
        let _outward = waits(to_wan, self.lan_ended, connection.lan_to_wan());
        let _inward = waits(to_lan, self.wan_ended, connection.wan_to_lan());
        let lan_wants = wants(!to_wan && !self.lan_ended, to_lan);
        let wan_wants = wants(!to_lan && !self.wan_ended, to_wan);
        let (leg, ready) = tokio::select! {
            ready = lan.ready(lan_wants) => (Leg::Lan, ready),
            ready = wan.ready(wan_wants) => (Leg::Wan, ready),
            () = timer::sleep(AWAKE), if self.records.is_awake() => {
                self.records.rest();
                return Ok(());
            }
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
        match timer::timeout(FLUSH, other.ready(rest)).await {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::Ciphers;
    use crate::record::OVERHEAD_BYTES;
    use crate::record::tests::pair;

    /// What the peer says in records of these lengths, read by so many bytes a time at the most.
    fn opened(lengths: &[usize], read_bytes: impl Fn(usize) -> usize) {
        let (mut client, mut server) = pair(Ciphers::default());
        let (mut said, mut wire) = (Vec::new(), Vec::new());
        for (number, length) in lengths.iter().enumerate() {
            let content: Vec<u8> = (0..*length).map(|place| (place * 7 + number) as u8).collect();
            let mut record = vec![0; length + OVERHEAD_BYTES];
            record[HEADER_BYTES..][..*length].copy_from_slice(&content);
            client.seal(23, &mut record).unwrap();
            said.extend(content);
            wire.extend(record);
        }
        let (mut inbox, mut heard, mut calls) = (Inbox::take(), Vec::new(), 0);
        while !wire.is_empty() {
            let room = inbox.room();
            let count = wire.len().min(room.len()).min(read_bytes(calls).max(1));
            assert!(!room.is_empty());
            room[..count].copy_from_slice(&wire[..count]);
            wire.drain(..count);
            inbox.sealed.end += count;
            assert!(!inbox.open(&mut server).unwrap());
            assert!(inbox.pieces.iter().all(|piece| piece.end <= inbox.sealed.start));
            for piece in std::mem::take(&mut inbox.pieces) {
                heard.extend_from_slice(&inbox.buffer[piece]);
            }
            calls += 1;
        }
        assert!(inbox.sealed.is_empty());
        assert!(heard == said);
    }

    #[test]
    fn records_of_any_length_in_pieces_of_any_length_are_the_stream_again() {
        let full: Vec<usize> = vec![16384; 60];
        let mixed: Vec<usize> =
            (0..400).map(|number| [0, 1, 64, 2047, 2048, 9000, 16384][number * number % 7]).collect();
        for lengths in [&full, &mixed, &vec![64; 5000]] {
            for read_bytes in [usize::MAX, 200_000, 65_536, 16_406, 4_000] {
                opened(lengths, |_| read_bytes);
            }
            opened(lengths, |call| call * 7919 % 40_000);
        }
        opened(&[16384, 1, 300], |_| 1);
    }
}
