//! The relay's clock: leases, rates, idle connections, pacing, and the decision that it is over.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::connection::{Connection, lock};
use crate::relay::{End, Relay};

/// How often connections are looked at while there are any.
const TICK: Duration = Duration::from_millis(250);
/// How often a rate is divided anew.
const PACING_TICK: Duration = Duration::from_millis(100);
const REFUSALS: Duration = Duration::from_secs(1);

/// Runs until the relay ends, and says how.
pub async fn supervise(relay: &Arc<Relay>) -> End {
    let mut bytes_seen = 0;
    let mut refusals_said = Instant::now();
    let mut paced = false;
    loop {
        let now = Instant::now();
        let connections = relay.connections();
        let bytes = connections.iter().map(|connection| connection.bytes()).sum::<u64>();
        if bytes != bytes_seen && !connections.is_empty() {
            relay.touch();
        }
        bytes_seen = bytes;
        for connection in &connections {
            look_at(relay, connection, now);
        }
        let rate = relay.rate_mbits_per_s();
        if rate > 0 || paced {
            pace(&connections, rate);
            paced = rate > 0;
        }
        if now.duration_since(refusals_said) >= REFUSALS {
            relay.say_refusals();
            refusals_said = now;
        }
        relay.consider(now);
        let tick = if paced && !connections.is_empty() {
            PACING_TICK
        } else if connections.is_empty() {
            REFUSALS
        } else {
            TICK
        };
        let next = (now + tick).min(relay.next_deadline()).max(now + Duration::from_millis(1));
        tokio::select! {
            end = relay.ended() => return end,
            () = relay.wake.notified() => {}
            () = tokio::time::sleep_until(next.into()) => {}
        }
    }
}

fn look_at(relay: &Relay, connection: &Connection, now: Instant) {
    let Some(legs) = connection.legs() else { return };
    let mut gauge = lock(&connection.gauge);
    gauge.sample(now, connection, &legs);
    let idle_s = relay.config.idle_s;
    if idle_s > 0.0 && gauge.idle_s(now) >= idle_s {
        connection.cut("idle");
    }
}

/// Divides the rate among the connections that move bytes; one that begins to gets the same share until the next division.
/// The kernel does the pacing, on the socket that sends into the WAN.
fn pace(connections: &[Arc<Connection>], rate_mbits_per_s: u64) {
    let moving = |connection: &&Arc<Connection>| {
        let gauge = lock(&connection.gauge);
        gauge.to_consumer_bits_per_s + gauge.to_producer_bits_per_s > 0.0
    };
    let shares = connections.iter().filter(moving).count().max(1) as u64;
    let bytes_per_s = if rate_mbits_per_s == 0 { u64::MAX } else { rate_mbits_per_s * 125_000 / shares };
    for legs in connections.iter().filter_map(|connection| connection.legs()) {
        // A socket that has just been closed has no rate.
        let _ = s2ds_sys::set_max_pacing_rate(&*legs.wan, bytes_per_s);
    }
}
