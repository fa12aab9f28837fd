//! The PROD side of a WAN connection: prove the peer, read what it wants, connect onwards, answer, carry.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::net::RecvFlags;

use crate::carry::Begun;
use crate::config::{Mode, Probe};
use crate::connection::Legs;
use crate::errno;
use crate::listen::{Active, Ticket};
use crate::preamble::{Answer, FIRST_WORD_BYTES, Kind, MAGIC, REQUEST_BYTES, Request, Verdict};
use crate::relay::{Books, Closing, Kept, Listener, ProbeResult, Relay};
use crate::socket::{
    First, TcpStream, close_in_order, connect, discard, has_failed, read_exact, shutdown_write, write_all,
};
use crate::timer;
use crate::tls::{ALERT_BYTES, HandshakeError, Session, least_record_bytes};

/// An application that has sent something and closed within this time after it was connected had a session, a short one.
const WHOLE_SESSION: Duration = Duration::from_secs(5);
/// Of the time in which CONS wants its answer: so long may a probe wait for a target. The rest is for connecting to it.
const HELD_PART: f64 = 0.8;
/// And no longer, because what CONS grants are its own time-outs and not ours; so much is that part of the usual ones.
const LONGEST_HELD: Duration = Duration::from_secs(12);
const MOST_HELD: u64 = 4;
/// Between two attempts at a target that has changed.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Begins one WAN connection. Until the peer is proven it holds a place among the half-open and nothing else. None: it was
/// turned away, or was a probe.
pub async fn begin(
    relay: Arc<Relay>,
    listener: Arc<Listener>,
    stream: TcpStream,
    source: SocketAddr,
    ticket: Ticket,
) -> Option<Begun> {
    let (wan, kind, target) = admit(&relay, &listener, stream, source, ticket).await?;
    match kind {
        // Boxed, so that what waits for its handshake takes less than a kilobyte, which the allocator has at hand.
        Kind::Data => return Box::pin(begin_data(wan, listener, source, target)).await,
        Kind::ProbePath => wan.pass(&listener, Kind::ProbePath).await,
        Kind::ProbeTarget => serve_probe(wan, listener, target).await,
    }
    None
}

/// What a proven peer wants, and the target it leads to. None: it has been turned away.
async fn admit<'a>(
    relay: &'a Arc<Relay>,
    listener: &Listener,
    stream: TcpStream,
    source: SocketAddr,
    ticket: Ticket,
) -> Option<(Wan<'a>, Kind, SocketAddr)> {
    let greeting = timer::timeout(relay.handshake_timeout(), greet(relay, &stream, source)).await;
    drop(ticket);
    let (session, request) = match greeting {
        Ok(Ok(greeted)) => greeted,
        // Dropping the stream resets it: a stranger learns nothing more.
        Ok(Err(cause)) => {
            relay.refuse(listener, cause, source.ip());
            return None;
        }
        Err(_) => {
            relay.refuse(listener, "handshake-timeout", source.ip());
            return None;
        }
    };
    let wan = Wan { relay, stream, session };
    let verdict = match request {
        Err((verdict, cause)) => {
            relay.refuse(listener, cause, source.ip());
            verdict
        }
        Ok(request) if request.mode != relay.config.mode => Verdict::Protocol,
        Ok(request) if request.relay_id != relay.config.relay_id || request.listener != listener.index => {
            Verdict::Denied
        }
        Ok(request) => {
            if relay.config.mode.proves_keys() && request.lease_s > 0 {
                relay.renew_from_peer(request.lease_s);
            }
            let target = match request.kind {
                Kind::ProbePath | Kind::ProbeTarget => Box::pin(target_for_probe(relay, listener)).await,
                Kind::Data => relay.target(listener.index),
            };
            match target {
                None => Verdict::NotReady,
                // An update may have come while it was held.
                Some(_)
                    if request.kind != Kind::Data && !is_admitted(relay, wan.session.as_deref(), source) =>
                {
                    relay.refuse(listener, "peer-source", source.ip());
                    Verdict::Denied
                }
                Some(_) if relay.is_draining() => Verdict::Busy,
                Some(target) => return Some((wan, request.kind, target)),
            }
        }
    };
    wan.refuse(verdict).await;
    None
}

/// What a peer that has shown itself asks for, or what it is answered instead and the cause that is counted.
type Asked = Result<Request, (Verdict, &'static str)>;

/// The handshake, if the mode has one, and the request. The error is the cause that is counted; nothing is answered to it.
async fn greet(
    relay: &Relay,
    stream: &TcpStream,
    source: SocketAddr,
) -> Result<(Option<Box<Session>>, Asked), &'static str> {
    let mut message = [0; REQUEST_BYTES];
    let mut admitted = true;
    let session = if relay.config.mode == Mode::None {
        read_exact(stream, &mut message).await.map_err(|_| "preamble")?;
        // An update may have come while it was silent.
        if !is_admitted(relay, None, source) {
            return Err("source");
        }
        None
    } else {
        let cause = |error| match error {
            HandshakeError::Io(_) => "handshake-cut",
            HandshakeError::Tls(_) => "handshake-rejected",
        };
        let config = relay.server_config();
        let session = Session::server(config).map_err(|error| cause(HandshakeError::Tls(error)))?;
        let mut session = Box::new(session);
        // Boxed, here and below: what has no session, as in mode `none`, needs no memory for it.
        Box::pin(session.handshake(stream, least_record_bytes(REQUEST_BYTES))).await.map_err(cause)?;
        Box::pin(session.read_exact(stream, &mut message, 0)).await.map_err(cause)?;
        // The handshake admits any current peer's key; this one must also come from where its owner said.
        let key = session.peer_key().filter(|key| relay.admits_peer(*key, source.ip()));
        admitted = key.is_some();
        if let Some(key) = key {
            relay.proven_from(key, source.ip());
        }
        Some(session)
    };
    if !message.starts_with(MAGIC) {
        return Err("preamble");
    }
    let asked = match Request::decode(&message) {
        _ if !admitted => Err((Verdict::Denied, "peer-source")),
        Ok(request) => Ok(request),
        Err(verdict) => Err((verdict, "preamble")),
    };
    Ok((session, asked))
}

/// Whether the peer that has been proven, or in mode `none` the address, is one of the relay's at this moment.
fn is_admitted(relay: &Relay, session: Option<&Session>, source: SocketAddr) -> bool {
    match session {
        None => relay.has_peers() && relay.admits_source(source.ip()),
        Some(session) => session.peer_key().is_some_and(|key| relay.admits_peer(key, source.ip())),
    }
}

/// The target; or, where the first probe has been told at once that there is none yet, the one that comes within the time that
/// CONS waits for an answer: a thousand streams that wait for their producers cost hardly a handshake, and each is READY at once.
async fn target_for_probe(relay: &Relay, listener: &Listener) -> Option<SocketAddr> {
    let target = relay.target(listener.index);
    if target.is_some() || !listener.has_said_not_ready.swap(true, Ordering::Relaxed) {
        return target;
    }
    let _held = Held::enter(&listener.held)?;
    tokio::select! {
        target = relay.target_comes(listener.index) => Some(target),
        () = timer::sleep(relay.answer_timeout().mul_f64(HELD_PART).min(LONGEST_HELD)) => None,
        () = relay.closes_listeners() => None,
    }
}

/// One of the probes that a listener holds, until it is dropped.
struct Held<'a>(&'a AtomicU64);

impl<'a> Held<'a> {
    /// None: there are enough. Each has a descriptor, and a stream has one CONS relay for a listener, or a few.
    fn enter(held: &'a AtomicU64) -> Option<Held<'a>> {
        let one_more = |count| (count < MOST_HELD).then_some(count + 1);
        held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok().map(|_| Held(held))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Connects to the application and keeps that connection for the first user, so that a server which takes one session only
/// never sees one that is empty. One probe at a time: two would make two connections.
async fn serve_probe(mut wan: Wan<'_>, listener: Arc<Listener>, target: SocketAddr) {
    let relay = wan.relay;
    {
        let _one_at_a_time = relay.probing.lock().await;
        if !relay.is_proven(target) {
            match onward(relay, target).await {
                Ok(stream) => relay.keep(target, stream),
                Err(error) => return wan.unreachable(target, &error).await,
            }
        }
    }
    relay.note_probe(ProbeResult { result: "ok", errno: None, address: Some(target), at: Instant::now() });
    wan.pass(&listener, Kind::ProbeTarget).await;
}

async fn begin_data(
    wan: Wan<'_>,
    listener: Arc<Listener>,
    source: SocketAddr,
    target: SocketAddr,
) -> Option<Begun> {
    let relay = wan.relay;
    let Some(active) = Active::enter(&listener, relay.config.max_connections) else {
        relay.refuse(&listener, "busy", source.ip());
        wan.refuse(Verdict::Busy).await;
        return None;
    };
    let connection = relay.open(active.listener(), source);
    let books = Books(relay.clone(), connection.clone());
    let closing = tokio::select! {
        begun = answer(wan, target) => match begun {
            Ok((legs, session)) => {
                return Some(Begun { books, active, onward: target, legs, session, first_word: Ok(0) });
            }
            Err(closing) => closing,
        },
        reason = connection.is_cut() => Closing { reason, abort: None, text: None },
    };
    relay.close(&connection, Some(closing));
    None
}

/// Connects onwards and says how that went.
async fn answer(mut wan: Wan<'_>, target: SocketAddr) -> Result<(Legs, Option<Box<Session>>), Closing> {
    match first_or_fresh(wan.relay, target).await {
        Ok(lan) => match wan.accept().await {
            Ok((wan, session)) => Ok((Legs { lan, wan }, session)),
            Err(text) => Err(Closing { reason: "peer", abort: None, text: Some(text) }),
        },
        Err(error) => {
            wan.unreachable(target, &error).await;
            Err(Closing { reason: "unreachable", abort: None, text: Some(errno::of(&error)) })
        }
    }
}

async fn onward(relay: &Relay, target: SocketAddr) -> io::Result<TcpStream> {
    connect(target, relay.config.onward_source, relay.connect_timeout(), &relay.congestion, First::Anyone)
        .await
}

/// The connection that a probe left, or a new one.
///
/// An application may have ended the kept one. If it did so soon after it had been made, and has sent something, that was its
/// whole session: nothing of it may be lost. If it did so later, it has waited in vain (ZeroMQ closes after 30 s without a
/// greeting) and is asked anew; should it be gone, what it left is all there is.
async fn first_or_fresh(relay: &Relay, target: SocketAddr) -> io::Result<TcpStream> {
    match relay.take_kept(target) {
        Some(kept) => Box::pin(kept_or_fresh(relay, target, kept)).await,
        None => onward(relay, target).await,
    }
}

async fn kept_or_fresh(relay: &Relay, target: SocketAddr, kept: Kept) -> io::Result<TcpStream> {
    // The worker that probed watches it.
    let stream = TcpStream::watched(kept.stream.into_std())?;
    let Some(closed_after) = kept.closed_after else { return Ok(stream) };
    if has_failed(&stream) {
        return onward(relay, target).await;
    }
    let has_sent = peek(&stream).unwrap_or(0) > 0;
    if has_sent && closed_after < WHOLE_SESSION {
        return Ok(stream);
    }
    match onward(relay, target).await {
        Ok(fresh) => {
            close_in_order(&stream);
            Ok(fresh)
        }
        Err(error) if !has_sent => Err(error),
        Err(_) => Ok(stream),
    }
}

fn peek(stream: &TcpStream) -> io::Result<usize> {
    let mut first = [0_u8; 1];
    Ok(rustix::net::recv(stream, &mut first, RecvFlags::PEEK | RecvFlags::DONTWAIT)?.0)
}

/// Proves targets that have changed after READY: the way to here is proven, so this relay connects onwards by itself.
pub async fn prove_targets(relay: Arc<Relay>) {
    loop {
        relay.probe_wake.notified().await;
        let mut pause = FIRST_PAUSE;
        loop {
            let targets = relay.targets_to_prove();
            if targets.is_empty() {
                break;
            }
            let mut proven = true;
            for target in targets {
                let _one_at_a_time = relay.probing.lock().await;
                if relay.is_proven(target) {
                    continue;
                }
                match onward(&relay, target).await {
                    Ok(stream) => relay.keep(target, stream),
                    Err(error) => {
                        proven = false;
                        let errno = Some(errno::of(&error));
                        let address = Some(target);
                        relay.note_probe(ProbeResult {
                            result: "unreachable",
                            errno,
                            address,
                            at: Instant::now(),
                        });
                    }
                }
            }
            if proven {
                relay.proven(Probe::Target);
                break;
            }
            // A newer update is worth another look at once.
            let _ = timer::timeout(pause, relay.probe_wake.notified()).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// The WAN side of a connection that is being answered.
struct Wan<'a> {
    relay: &'a Arc<Relay>,
    stream: TcpStream,
    session: Option<Box<Session>>,
}

impl Wan<'_> {
    /// Answers and closes in order, so that the answer arrives even if a segment is lost on the way.
    async fn refuse(mut self, verdict: Verdict) {
        let _ = self.end_with(Answer::of(verdict)).await;
        self.close();
    }

    async fn unreachable(&mut self, target: SocketAddr, error: &io::Error) {
        let errno = Some(errno::of(error));
        self.relay.note_probe(ProbeResult {
            result: "unreachable",
            errno,
            address: Some(target),
            at: Instant::now(),
        });
        let answer = Answer { errno: errno::number(error) as u16, ..Answer::of(Verdict::Unreachable) };
        let _ = self.end_with(answer).await;
        self.close();
    }

    async fn pass(mut self, listener: &Listener, kind: Kind) {
        if self.end_with(Answer::of(Verdict::Ok)).await.is_ok() {
            self.relay.probed(listener.index, kind);
        }
        self.close();
    }

    /// Says ok; what follows is payload. In mode `auth` both sides end TLS here.
    async fn accept(mut self) -> Result<(TcpStream, Option<Box<Session>>), String> {
        let timeout = self.relay.handshake_timeout();
        let hand_over = async {
            match self.relay.config.mode {
                Mode::None | Mode::Tls => self.answer(Answer::of(Verdict::Ok)).await,
                Mode::Auth => {
                    self.end_with(Answer::of(Verdict::Ok)).await?;
                    if let Some(session) = &mut self.session {
                        Box::pin(session.read_close_notify(&self.stream)).await?;
                    }
                    self.session = None;
                    Ok(())
                }
            }
        };
        match timer::timeout(timeout, hand_over).await {
            Ok(Ok(())) => Ok((self.stream, self.session)),
            Ok(Err(HandshakeError::Io(error))) => Err(errno::of(&error)),
            Ok(Err(HandshakeError::Tls(error))) => Err(error.to_string()),
            Err(_) => Err("ETIMEDOUT".into()),
        }
    }

    /// Answers; payload follows.
    async fn answer(&mut self, answer: Answer) -> Result<(), HandshakeError> {
        self.say(answer, false).await
    }

    /// Answers, and ends this direction of TLS in the same flight.
    async fn end_with(&mut self, answer: Answer) -> Result<(), HandshakeError> {
        self.say(answer, true).await
    }

    async fn say(&mut self, mut answer: Answer, is_last: bool) -> Result<(), HandshakeError> {
        answer.lease_s = self.relay.lease_remaining_s() as u32;
        match &mut self.session {
            Some(session) => {
                session.send(&answer.encode())?;
                if is_last {
                    session.send_close_notify()?;
                }
                Box::pin(session.flush(&self.stream)).await?;
            }
            None => write_all(&self.stream, &answer.encode()).await?,
        }
        Ok(())
    }

    fn close(&self) {
        // CONS may have ended TLS behind its request, and said more; a reset because of that could overtake the answer.
        discard(&self.stream, least_record_bytes(ALERT_BYTES) + least_record_bytes(FIRST_WORD_BYTES));
        let _ = shutdown_write(&self.stream);
        close_in_order(&self.stream);
    }
}
