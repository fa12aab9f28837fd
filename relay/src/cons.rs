//! The CONS side: dial the PROD relay, prove both ends, ask, carry; and the probing that makes READY mean something.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::carry::Begun;
use crate::config::{Mode, Probe};
use crate::connection::Legs;
use crate::errno;
use crate::listen::Active;
use crate::preamble::{ANSWER_BYTES, Answer, FIRST_WORD_BYTES, Kind, REQUEST_BYTES, Request, Verdict};
use crate::relay::{Books, Closing, Dial, NO_PEERS, ProbeResult, Reason, Relay};
use crate::socket::{
    First, TcpStream, close_in_order, connect, have_spoken, read_exact, shutdown_write, write_all,
};
use crate::timer;
use crate::tls::{ALERT_BYTES, HandshakeError, Session, WHOLE_FLIGHT_BYTES, least_record_bytes};

/// Between two rounds of probes: short at first, because PROD learns of us a moment after we start.
const FIRST_PAUSE_S: f64 = 0.02;
const LONGEST_PAUSE_S: f64 = 2.0;
const PAUSE_GROWTH: f64 = 1.6;

/// The result of a call that nobody has answered.
const TIMEOUT: &str = "timeout";

/// Begins one LAN connection. What cannot be carried is reset, as a direct connection would be refused.
pub async fn begin(relay: Arc<Relay>, active: Active, lan: TcpStream, source: SocketAddr) -> Option<Begun> {
    let connection = relay.open(active.listener(), source);
    let books = Books(relay.clone(), connection.clone());
    let Some(dial) = relay.dial(active.listener().index) else {
        relay.refuse(active.listener(), NO_PEERS, source.ip());
        relay.close(&connection, None);
        return None;
    };
    let consumer = Consumer { lan: &lan, sent_bytes: AtomicUsize::new(0) };
    let called = tokio::select! {
        called = call(&relay, &dial, Kind::Data, 0, Some(&consumer)) => called.map_err(|failure| {
            relay.note_probe(failure.clone());
            // Without an answer PROD may have passed the word on; what it has refused it has not.
            let unanswered = failure.result == TIMEOUT && consumer.sent_bytes() > 0;
            if !unanswered {
                consumer.sent_bytes.store(0, Ordering::Relaxed);
            }
            Closing {
                reason: failure.result,
                abort: unanswered.then_some(Reason::RelayLost),
                text: failure.errno,
            }
        }),
        reason = connection.is_cut() => Err(Closing { reason, abort: None, text: None }),
    };
    let sent_bytes = consumer.sent_bytes();
    if sent_bytes > 0 {
        connection.first_byte();
        connection.lan_to_wan().add(sent_bytes);
    }
    match called {
        Ok(Called { wan, session, heard }) => {
            let first_word = heard.map(|()| sent_bytes);
            Some(Begun { books, active, onward: dial.address, legs: Legs { lan, wan }, session, first_word })
        }
        Err(closing) => {
            drop(lan);
            relay.close(&connection, Some(closing));
            None
        }
    }
}

/// The application that a connection is for.
struct Consumer<'a> {
    lan: &'a TcpStream,
    /// Of what it has said, on the WAN already.
    sent_bytes: AtomicUsize,
}

impl Consumer<'_> {
    fn sent_bytes(&self) -> usize {
        self.sent_bytes.load(Ordering::Relaxed)
    }
}

/// What PROD has said ok to.
struct Called {
    wan: TcpStream,
    session: Option<Box<Session>>,
    /// How the application has failed meanwhile.
    heard: io::Result<()>,
}

/// Connects to a PROD listener and asks for `kind`. After Ok for data, what follows on the stream is payload (inside the
/// session, if there is one). A probe's connection is closed.
///
/// What the consumer has said by then goes behind the request, so that the producer has it a round trip of the WAN earlier. PROD
/// has proven its key before that, in the modes where it has one.
async fn call(
    relay: &Relay,
    dial: &Dial,
    kind: Kind,
    lease_s: u32,
    consumer: Option<&Consumer<'_>>,
) -> Result<Called, ProbeResult> {
    let failed = |result: &'static str, errno: Option<String>| ProbeResult {
        result,
        errno,
        address: Some(dial.address),
        at: Instant::now(),
    };
    let source = relay.config.onward_source;
    let dialled = || connect(dial.address, source, relay.connect_timeout(), &relay.congestion, First::We);
    let mut stream = dialled().await.map_err(|error| {
        let result = match error.kind() {
            io::ErrorKind::ConnectionRefused => "refused",
            io::ErrorKind::TimedOut => TIMEOUT,
            // PROD has accepted, and turned us away before we looked; as below.
            io::ErrorKind::ConnectionReset => "not-ready",
            _ => "no-route",
        };
        failed(result, Some(errno::of(&error)))
    })?;
    let timeout = relay.answer_timeout();
    let conversation = async move {
        let mut session = None;
        if relay.config.mode != Mode::None {
            let caller = relay.caller(dial.public_key)?;
            let (client, resumes) = caller.session()?;
            let mut client = Box::new(client);
            client.handshake(&stream, WHOLE_FLIGHT_BYTES).await?;
            if relay.config.mode == Mode::Tls && resumes && !client.is_resumed() {
                // PROD has given the ticket up, and what is left is a handshake that later computers can read, which in mode `auth`
                // each may be. Its place is given back before another one is taken.
                drop(stream);
                stream = dialled().await?;
                client = Box::new(caller.session_anew()?);
                client.handshake(&stream, WHOLE_FLIGHT_BYTES).await?;
            }
            session = Some(client);
        }
        let request =
            Request { kind, mode: relay.config.mode, relay_id: dial.relay_id, listener: dial.index, lease_s };
        let mut message = [0; ANSWER_BYTES];
        let has_sent = |heard: &io::Result<usize>| {
            if let (Some(consumer), Ok(heard_bytes)) = (consumer, heard) {
                consumer.sent_bytes.store(*heard_bytes, Ordering::Relaxed);
            }
        };
        // In mode `auth` TLS ends in both directions with the request and with its answer.
        let ends = relay.config.mode == Mode::Auth && kind == Kind::Data;
        let heard;
        match &mut session {
            Some(session) => {
                session.send(&request.encode())?;
                let mut word = Vec::new();
                heard = hear(consumer, &mut word);
                if ends {
                    session.send_close_notify()?;
                    session.outgoing.add_clear(&word);
                } else if !word.is_empty() {
                    session.send(&word)?;
                }
                drop(word);
                session.flush(&stream).await?;
                has_sent(&heard);
                let behind_bytes = if ends { least_record_bytes(ALERT_BYTES) } else { 0 };
                session.read_exact(&stream, &mut message, behind_bytes).await?;
            }
            None => {
                let mut words = Vec::with_capacity(REQUEST_BYTES + FIRST_WORD_BYTES);
                words.extend_from_slice(&request.encode());
                heard = hear(consumer, &mut words);
                write_all(&stream, &words).await?;
                drop(words);
                has_sent(&heard);
                have_spoken(&stream);
                read_exact(&stream, &mut message).await?;
            }
        }
        let answer = Answer::decode(&message);
        let go_on = kind == Kind::Data && answer.is_some_and(|answer| answer.verdict == Verdict::Ok);
        match &mut session {
            Some(client) if go_on && ends => {
                client.read_close_notify(&stream).await?;
                session = None;
            }
            // The verdict is there, whether PROD hears this or has gone.
            Some(client) if !go_on && !ends => {
                let _ = client.send_close_notify();
                let _ = client.flush(&stream).await;
            }
            _ => {}
        }
        if !go_on {
            let _ = shutdown_write(&stream);
            close_in_order(&stream);
        }
        Ok::<_, HandshakeError>((answer, Called { wan: stream, session, heard: heard.map(drop) }))
    };
    let (answer, called) = match timer::timeout(timeout, conversation).await {
        Ok(Ok(answered)) => answered,
        // PROD closes on us while it has no peers: it is not ready, or it is no relay.
        Ok(Err(HandshakeError::Io(error))) => return Err(failed("not-ready", Some(errno::of(&error)))),
        Ok(Err(HandshakeError::Tls(error))) => return Err(failed("peer-rejected", Some(error.to_string()))),
        Err(_) => return Err(failed(TIMEOUT, Some("ETIMEDOUT".into()))),
    };
    let errno = answer.filter(|answer| answer.errno != 0).map(|answer| errno::name(answer.errno.into()));
    match answer.map(|answer| answer.verdict) {
        Some(Verdict::Ok) => Ok(called),
        Some(Verdict::Unreachable) => Err(failed("unreachable", errno)),
        Some(Verdict::Busy) => Err(failed("busy", errno)),
        Some(Verdict::Denied) => Err(failed("denied", errno)),
        Some(Verdict::NotReady) => Err(failed("not-ready", errno)),
        Some(Verdict::Protocol) | None => Err(failed("protocol", errno)),
    }
}

/// Takes what an application has said already, to the end of `words`; how many bytes that were. Having ended or said nothing it
/// is asked again later. A reset is said only once, so its error is kept.
fn hear(consumer: Option<&Consumer<'_>>, words: &mut Vec<u8>) -> io::Result<usize> {
    let Some(consumer) = consumer else { return Ok(0) };
    let before = words.len();
    words.resize(before + FIRST_WORD_BYTES, 0);
    let heard = match consumer.lan.try_read(&mut words[before..]) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        heard => heard,
    };
    words.truncate(before + heard.as_ref().unwrap_or(&0));
    heard
}

/// Probes every PROD listener until all have answered ok, then passes renewals on, for as long as the relay lives.
pub async fn probe(relay: Arc<Relay>) {
    let mut pause_s = FIRST_PAUSE_S;
    loop {
        let began = Instant::now();
        if !relay.is_proven_through() {
            let kind = if relay.config.probe == Probe::Target { Kind::ProbeTarget } else { Kind::ProbePath };
            match probe_all(&relay, kind).await {
                Ok(_) => {}
                Err(failure) => relay.note_probe(failure),
            }
        }
        if relay.is_proven_through() {
            pause_s = FIRST_PAUSE_S;
            pass_lease_on(&relay).await;
            if relay.lease_to_pass_on().is_some() {
                // It did not arrive; the far side's lease is not over yet.
                let again = Duration::from_secs_f64(LONGEST_PAUSE_S);
                let _ = timer::timeout(again, relay.probe_wake.notified()).await;
            } else {
                relay.probe_wake.notified().await;
            }
        } else {
            // A probe that PROD has held until now was the pause.
            let jittered = Duration::from_secs_f64(pause_s * (0.75 + 0.5 * fastrand::f64()))
                .saturating_sub(began.elapsed())
                .max(Duration::from_secs_f64(FIRST_PAUSE_S));
            // Waking early costs one round of probes; what has changed is probably what they wait for.
            let _ = timer::timeout(jittered, relay.probe_wake.notified()).await;
            pause_s = (pause_s * PAUSE_GROWTH).min(LONGEST_PAUSE_S);
        }
    }
}

/// One round. False: there is nothing to probe yet, or other peers since it began.
async fn probe_all(relay: &Arc<Relay>, kind: Kind) -> Result<bool, ProbeResult> {
    // In this order: dials may be newer than this, and then count for nothing.
    let changes = relay.peers_changed();
    let dials = relay.dials();
    if dials.is_empty() {
        return Ok(false);
    }
    let mut probes = JoinSet::new();
    for dial in dials {
        let relay = relay.clone();
        probes.spawn(async move { call(&relay, &dial, kind, 0, None).await.map(|_| dial.address) });
    }
    let (mut address, mut failure, mut lost) = (None, None, false);
    // All of them: a listener that is not ready is no reason to hang up on the others.
    loop {
        let probed = tokio::select! {
            probed = probes.join_next() => probed,
            // PROD may hold a probe for seconds; who is no peer any more is not waited for.
            () = relay.peers_change(changes) => return Ok(false),
        };
        let Some(probed) = probed else { break };
        match probed {
            Ok(Ok(probed)) => address = Some(probed),
            Ok(Err(failed)) => failure = failure.or(Some(failed)),
            // A probe that has not come back has proven nothing.
            Err(_) => lost = true,
        }
    }
    if let Some(failure) = failure {
        return Err(failure);
    }
    if lost {
        return Ok(false);
    }
    let proven = relay.proven_of(changes, relay.config.probe);
    if proven {
        relay.note_probe(ProbeResult { result: "ok", errno: None, address, at: Instant::now() });
    }
    Ok(proven)
}

/// A renewal at CONS reaches each PROD relay over the leg that its key has proven. What does not arrive is tried again.
async fn pass_lease_on(relay: &Relay) {
    let Some((until, lease_s)) = relay.lease_to_pass_on() else { return };
    if lease_s == 0 {
        return relay.passed_on(until);
    }
    let mut passed = Vec::new();
    for dial in relay.dials() {
        if !passed.contains(&dial.relay_id.0) {
            passed.push(dial.relay_id.0);
            if let Err(failure) = call(relay, &dial, Kind::ProbePath, lease_s, None).await {
                return relay.note_probe(failure);
            }
        }
    }
    relay.passed_on(until);
}
