//! Rates, and which leg limits: sampled from counters and TCP_INFO, once a tick and never in the data path.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use s2ds_sys::{TcpInfo, tcp_info};
use serde_json::{Value, json};

use crate::config::Role;
use crate::connection::{Connection, Leg, Legs, Waited};
use crate::socket::TcpStream;

/// Rates are taken over at least this long.
const WINDOW: Duration = Duration::from_secs(1);

/// A direction that has waited for so much of the time had nothing to do in it.
const MOST_OF_THE_TIME: f64 = 0.99;

/// A sender whose pacing (BBR) has adapted to a slow reader finds the window closed for a part of the time only; one behind a
/// slow network hardly ever does. So a closed window counts this many times.
const CLOSED_WINDOW_WEIGHT: f64 = 4.0;

/// A source with more to send than its network takes fills every segment. In a window, this much less is the ends of messages
/// after which it had nothing to send: bytes, and part of all bytes.
const SHORT_BYTES: f64 = 3000.0;
const SHORT_PART: f64 = 0.0005;

/// The figures of one connection. Thousands may be idle, so one that moves nothing knows what it has moved, and no more.
#[derive(Default)]
pub struct Gauge {
    window: Option<Box<Window>>,
    last_moved: Option<Moved>,
}

/// When bytes were last seen to have moved, and how many had by then.
#[derive(Clone, Copy)]
struct Moved {
    at: Instant,
    to_consumer: u64,
    to_producer: u64,
}

/// What a connection that moves bytes has done of late.
struct Window {
    /// Where it begins.
    first: Sample,
    later: VecDeque<Sample>,
    to_consumer_bits_per_s: f64,
    to_producer_bits_per_s: f64,
    shares: Option<Shares>,
}

#[derive(Clone, Copy)]
struct Sample {
    at: Instant,
    to_consumer: u64,
    to_producer: u64,
    waited_to_consumer: Waited,
    waited_to_producer: Waited,
    lan: Seen,
    wan: Seen,
}

/// What the shares need of a leg's TCP_INFO.
#[derive(Clone, Copy)]
struct Seen {
    receiver_limited_us: u64,
    received_bytes: u64,
    received_segments: u32,
    receive_mss_bytes: u32,
}

impl Seen {
    fn of(info: &TcpInfo) -> Seen {
        Seen {
            receiver_limited_us: info.receiver_limited_us,
            received_bytes: info.received_bytes,
            received_segments: info.received_segments,
            receive_mss_bytes: info.receive_mss_bytes,
        }
    }
}

impl Sample {
    /// Nothing has moved since `old`, and that because nothing came.
    fn is_silent_since(&self, old: &Sample) -> bool {
        let most_ns = (self.at - old.at).as_nanos() as f64 * MOST_OF_THE_TIME;
        let waited = |new: Waited, old: Waited| new.source_ns.saturating_sub(old.source_ns) as f64 >= most_ns;
        (self.to_consumer, self.to_producer) == (old.to_consumer, old.to_producer)
            && waited(self.waited_to_consumer, old.waited_to_consumer)
            && waited(self.waited_to_producer, old.waited_to_producer)
    }

    /// What this one would have been a window earlier, of a connection that has been silent from `moved` until now.
    fn a_window_ago(self, moved: &Moved) -> Sample {
        let earlier = |waited: Waited| Waited {
            source_ns: waited.source_ns.saturating_sub(WINDOW.as_nanos() as u64),
            ..waited
        };
        Sample {
            at: self.at.checked_sub(WINDOW).unwrap_or(self.at),
            to_consumer: moved.to_consumer,
            to_producer: moved.to_producer,
            waited_to_consumer: earlier(self.waited_to_consumer),
            waited_to_producer: earlier(self.waited_to_producer),
            ..self
        }
    }
}

/// Where the time of the larger direction went: parts of 1.
///
/// Waiting for the source or for room is measured where it happens. Waiting for room is the receiver's doing for as long as
/// TCP found its window closed, else the network's. What is left is this relay at work.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shares {
    /// True: the direction is from the producer to the consumer.
    pub to_consumer: bool,
    /// Nothing came in: whatever feeds this relay is slower.
    pub starved: f64,
    /// Of that, what the application that feeds this relay is behind, by how its bytes arrive; the rest is its network. Only a
    /// relay that receives from the application itself can tell.
    pub starved_by_application: f64,
    /// The network behind the sending socket takes no more.
    pub network: f64,
    /// Whoever reads behind the sending socket takes no more.
    pub receiver: f64,
    /// This relay: its processor is the limit.
    pub relay: f64,
}

impl Gauge {
    /// Takes a sample and forgets what is older than the window. The answer is what TCP says of the legs.
    pub fn sample<'a>(
        &mut self,
        connection: &Connection,
        legs: &'a Legs,
    ) -> [(Leg, &'a TcpStream, TcpInfo); 2] {
        let lan = tcp_info(&legs.lan).unwrap_or_default();
        let wan = tcp_info(&legs.wan).unwrap_or_default();
        self.add(
            connection,
            Sample {
                // Not of the tick, whose thousandth connection is looked at milliseconds later: it would seem to have worked.
                at: Instant::now(),
                to_consumer: connection.to_consumer().bytes(),
                to_producer: connection.to_producer().bytes(),
                waited_to_consumer: connection.to_consumer().waited(),
                waited_to_producer: connection.to_producer().waited(),
                lan: Seen::of(&lan),
                wan: Seen::of(&wan),
            },
        );
        [(Leg::Lan, &legs.lan, lan), (Leg::Wan, &legs.wan, wan)]
    }

    fn add(&mut self, connection: &Connection, new: Sample) {
        let before = self.last_moved;
        let moved = Moved { at: new.at, to_consumer: new.to_consumer, to_producer: new.to_producer };
        let has_moved = before.is_none_or(|before| before.bytes() != moved.bytes());
        if has_moved {
            self.last_moved = Some(moved);
        }
        let is_producer_side = connection.is_producer_side();
        let goes_on = match (&mut self.window, before) {
            (Some(window), _) => window.add(new, is_producer_side),
            (none, Some(before)) if has_moved && new.at - before.at >= WINDOW => {
                let window = none.insert(Box::new(Window::from(new.a_window_ago(&before))));
                window.add(new, is_producer_side)
            }
            // One that is new. Its first sample is no reason for a window: most of those that are idle have said something then.
            (none, Some(_)) if has_moved => {
                *none = Some(Box::new(Window::from(new)));
                true
            }
            _ => true,
        };
        if !goes_on {
            self.window = None;
        }
    }

    /// No more samples are taken until bytes move.
    pub fn rest(&mut self) {
        self.window = None;
    }

    /// To the consumer and to the producer, over the window.
    pub fn bits_per_s(&self) -> (f64, f64) {
        self.window
            .as_ref()
            .map_or((0.0, 0.0), |window| (window.to_consumer_bits_per_s, window.to_producer_bits_per_s))
    }

    pub fn shares(&self) -> Option<Shares> {
        self.window.as_ref()?.shares
    }

    /// No sample has been taken.
    pub fn is_new(&self) -> bool {
        self.last_moved.is_none()
    }

    /// Bytes have moved since the last sample.
    pub fn has_moved(&self, connection: &Connection) -> bool {
        self.last_moved.is_none_or(|moved| moved.bytes() != connection.bytes())
    }

    /// For how long nothing has moved; 0 until the first sample.
    pub fn idle_s(&self, now: Instant) -> f64 {
        self.last_moved.map_or(0.0, |moved| (now - moved.at).as_secs_f64())
    }
}

impl Moved {
    fn bytes(&self) -> u64 {
        self.to_consumer + self.to_producer
    }
}

impl Window {
    fn from(first: Sample) -> Window {
        Window {
            first,
            later: VecDeque::new(),
            to_consumer_bits_per_s: 0.0,
            to_producer_bits_per_s: 0.0,
            shares: None,
        }
    }

    /// Moves on to a sample. False: nothing has moved for all of its length, and that because nothing came.
    fn add(&mut self, new: Sample, is_producer_side: bool) -> bool {
        while let Some(second) = self.later.front()
            && new.at - second.at >= WINDOW
        {
            self.first = *second;
            self.later.pop_front();
        }
        let old = self.first;
        if new.at - old.at >= WINDOW && new.is_silent_since(&old) {
            return false;
        }
        self.later.push_back(new);
        let elapsed_s = (new.at - old.at).as_secs_f64();
        if elapsed_s <= 0.0 {
            return true;
        }
        self.to_consumer_bits_per_s = (new.to_consumer - old.to_consumer) as f64 * 8.0 / elapsed_s;
        self.to_producer_bits_per_s = (new.to_producer - old.to_producer) as f64 * 8.0 / elapsed_s;
        let to_consumer = self.to_consumer_bits_per_s >= self.to_producer_bits_per_s;
        let sends_on_wan = to_consumer == is_producer_side;
        let (before, after) = if sends_on_wan { (&old.wan, &new.wan) } else { (&old.lan, &new.lan) };
        let (waited_before, waited) = if to_consumer {
            (old.waited_to_consumer, new.waited_to_consumer)
        } else {
            (old.waited_to_producer, new.waited_to_producer)
        };
        let part = |later: u64, earlier: u64, per_s: f64| {
            (later.saturating_sub(earlier) as f64 / per_s / elapsed_s).min(1.0)
        };
        let starved = part(waited.source_ns, waited_before.source_ns, 1e9);
        let full = part(waited.destination_ns, waited_before.destination_ns, 1e9).min(1.0 - starved);
        let receiver = part(after.receiver_limited_us, before.receiver_limited_us, 1e6);
        let receiver = full.min(CLOSED_WINDOW_WEIGHT * receiver);
        let by_application = sends_on_wan && !fills_segments(&old.lan, &new.lan);
        self.shares = (self.to_consumer_bits_per_s + self.to_producer_bits_per_s > 0.0).then_some(Shares {
            to_consumer,
            starved,
            starved_by_application: if by_application { starved } else { 0.0 },
            network: full - receiver,
            receiver,
            relay: 1.0 - starved - full,
        });
        true
    }
}

/// Whether what arrived between two samples came in full segments: its sender always had more.
fn fills_segments(before: &Seen, after: &Seen) -> bool {
    let segments = f64::from(after.received_segments.wrapping_sub(before.received_segments));
    let bytes = after.received_bytes.saturating_sub(before.received_bytes) as f64;
    let short = segments * f64::from(after.receive_mss_bytes) - bytes;
    segments > 0.0 && short < SHORT_BYTES.max(SHORT_PART * bytes)
}

/// The verdict of one relay over its connections, each counted by the bytes it moves. None while nothing moves.
pub fn limiting(role: Role, gauges: &[(f64, Shares)]) -> Value {
    let weight: f64 = gauges.iter().map(|(rate, _)| rate).sum();
    if weight <= 0.0 {
        return Value::Null;
    }
    let mean = |part: fn(&Shares) -> f64| {
        gauges.iter().map(|(rate, shares)| rate * part(shares)).sum::<f64>() / weight
    };
    let to_consumer = mean(|shares| f64::from(u8::from(shares.to_consumer))) >= 0.5;
    let (starved, network, receiver) = (mean(|s| s.starved), mean(|s| s.network), mean(|s| s.receiver));
    let own = ("relay".to_string(), mean(|s| s.relay));
    // The side a direction comes from is behind the starvation; a sending WAN socket has the far side behind its receiver.
    let (from, to) = if to_consumer { ("producer", "consumer") } else { ("consumer", "producer") };
    let sends_on_wan = to_consumer == (role == Role::Prod);
    let shares = if sends_on_wan {
        let by_application = mean(|s| s.starved_by_application);
        vec![
            (format!("{from}_application"), by_application),
            (format!("{from}_lan"), starved - by_application),
            ("wan".into(), network),
            (to.to_string(), receiver),
            own,
        ]
    } else {
        vec![
            ("upstream".into(), starved),
            (format!("{to}_lan"), network),
            (format!("{to}_application"), receiver),
            own,
        ]
    };
    if shares.iter().all(|(_, share)| *share <= 0.0) {
        return Value::Null;
    }
    let (leg, share) = shares
        .iter()
        .fold(("", 0.0), |most, (leg, share)| if *share > most.1 { (leg, *share) } else { most });
    json!({
        "direction": if to_consumer { "to_consumer" } else { "to_producer" },
        "leg": leg,
        "share": share,
        "shares": shares.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
    })
}

/// TCP_INFO of one leg as the status prints it.
pub fn leg(socket: &TcpStream, age_s: f64) -> Value {
    let Ok(info) = tcp_info(socket) else { return Value::Null };
    let seconds = |us: u64| us as f64 / 1e6;
    // The kernel says u64::MAX for "no pacing".
    let pacing = (info.pacing_bytes_per_s != u64::MAX).then_some(info.pacing_bytes_per_s as f64 * 8.0);
    json!({
        "rtt_s": seconds(info.rtt_us.into()),
        "rtt_var_s": seconds(info.rtt_var_us.into()),
        "min_rtt_s": seconds(info.min_rtt_us.into()),
        "receive_rtt_s": seconds(info.receive_rtt_us.into()),
        "retransmits": info.retransmits,
        "lost": info.lost_segments,
        "cwnd_bytes": u64::from(info.cwnd_segments) * u64::from(info.mss_bytes),
        "mss_bytes": info.mss_bytes,
        "delivery_bits_per_s": info.delivery_bytes_per_s as f64 * 8.0,
        "pacing_bits_per_s": pacing,
        "busy_s": seconds(info.busy_us),
        "limited_by_application_s": (age_s - seconds(info.busy_us)).max(0.0),
        "limited_by_receiver_s": seconds(info.receiver_limited_us),
        "limited_by_send_buffer_s": seconds(info.send_buffer_limited_us),
        "notsent_bytes": info.notsent_bytes,
        "congestion_control": rustix::net::sockopt::tcp_congestion(socket).ok(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(begin: Instant, at_s: f64, to_consumer: u64, waited_s: f64) -> Sample {
        let waited = Waited { source_ns: (waited_s * 1e9) as u64, destination_ns: 0 };
        let seen = Seen::of(&TcpInfo::default());
        Sample {
            at: begin + Duration::from_secs_f64(at_s),
            to_consumer,
            to_producer: 0,
            waited_to_consumer: waited,
            waited_to_producer: waited,
            lan: seen,
            wan: seen,
        }
    }

    #[test]
    fn one_that_falls_silent_keeps_no_samples_and_speaks_again_at_the_rate_of_one_window() {
        let source = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
        let connection = Connection::new(1, 0, source, Role::Prod);
        let (mut gauge, begin) = (Gauge::default(), Instant::now() + WINDOW);
        let mut look = |at_s: f64, to_consumer: u64, waited_s: f64| {
            gauge.add(&connection, sample(begin, at_s, to_consumer, waited_s));
            (gauge.window.is_some(), gauge.bits_per_s().0)
        };
        assert_eq!(look(0.0, 1000, 0.0), (false, 0.0), "most say something to begin with, and no more");
        assert_eq!(look(0.25, 2000, 0.0), (true, 0.0));
        assert_eq!(look(0.5, 127_000, 0.0), (true, 4e6));
        assert_eq!(look(1.75, 127_000, 1.25), (false, 0.0));
        assert_eq!(look(100.0, 252_000, 99.5), (true, 1e6));
    }

    #[test]
    fn looked_at_each_tick_one_has_a_rate_between_its_messages_and_no_samples_a_window_after_the_last() {
        let source = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
        let connection = Connection::new(1, 0, source, Role::Prod);
        let (mut gauge, begin) = (Gauge::default(), Instant::now() + WINDOW);
        for tick in 0..40_u32 {
            let at_s = 0.25 * f64::from(tick);
            gauge.add(&connection, sample(begin, at_s, 1_000_000 * u64::from(tick / 3), at_s));
            assert!(tick < 6 || gauge.bits_per_s().0 >= 8e6, "tick {tick}");
        }
        for tick in 40..45 {
            let at_s = 0.25 * f64::from(tick);
            gauge.add(&connection, sample(begin, at_s, 13_000_000, at_s));
        }
        assert!(gauge.window.is_none());
        gauge.add(&connection, sample(begin, 100.0, 14_000_000, 100.0));
        assert_eq!(gauge.bits_per_s().0, 8e6);
    }
}
