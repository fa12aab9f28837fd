//! The relay's clock: leases, rates, idle connections, pacing, and the decision that it is over.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::carry::{LAN_SILENT, WAN_SILENT};
use crate::connection::{Connection, Leg, lock};
use crate::pace::{self, Pacer};
use crate::relay::{End, Relay};
use crate::socket::watch;
use crate::timer;

/// How often connections are looked at while there are any.
const TICK: Duration = Duration::from_millis(250);
const REFUSALS: Duration = Duration::from_secs(1);
/// A scan that goes on for hours must not fill the log: after so many summaries they come once a minute.
const MANY_SUMMARIES: u32 = 60;
const REFUSALS_LATER: Duration = Duration::from_secs(60);

/// A connection that has been silent for longer is not sampled again before it moves.
const SETTLED_S: f64 = 2.0;

/// So many probes of a closed window without an answer mean that the peer is gone. One or two do not: the answer is under way,
/// or was left out (Linux answers such segments every 500 ms at most).
const MANY_PROBES: u8 = 3;

/// Runs until the relay ends, and says how.
pub async fn supervise(relay: &Arc<Relay>) -> End {
    let mut bytes_seen = 0;
    let mut sampled: Option<Instant> = None;
    let mut refusals_said = Instant::now();
    let mut summaries = 0;
    let mut pacer: Option<Pacer> = None;
    loop {
        let now = Instant::now();
        let rate = relay.rate_mbits_per_s();
        let tick = if rate > 0 { pace::TICK } else { TICK };
        if sampled.is_none_or(|at| now - at >= tick) {
            sampled = Some(now);
            relay.look_at_kept();
            let bytes = relay.bytes();
            if bytes != bytes_seen {
                relay.touch();
            }
            bytes_seen = bytes;
            let connections = relay.connections();
            for connection in &connections {
                look_at(relay, connection, now);
            }
            if rate > 0 || pacer.is_some() {
                pacer.get_or_insert_with(|| Pacer::new(now)).pace(now, &connections, rate);
                pacer = pacer.filter(|_| rate > 0);
            }
        }
        if now - refusals_said >= if summaries < MANY_SUMMARIES { REFUSALS } else { REFUSALS_LATER } {
            summaries += u32::from(relay.say_refusals());
            refusals_said = now;
        }
        relay.consider(now);
        // Bytes of a connection that has just closed count for the lease from the next tick on, not from a second later.
        let pause = if relay.rests(bytes_seen) { REFUSALS } else { tick };
        let sleeps = pause == REFUSALS && relay.sleeps();
        let next = if sleeps { relay.next_deadline() } else { relay.next_deadline().min(now + pause) };
        tokio::select! {
            end = relay.ended() => return end,
            () = relay.wake.notified() => {}
            () = timer::sleep_until(next.max(now + Duration::from_millis(1))) => {}
        }
        if sleeps {
            refusals_said = Instant::now(); // the first one waits for its like
        }
    }
}

fn look_at(relay: &Relay, connection: &Connection, now: Instant) {
    let Some(legs) = connection.legs() else { return };
    let mut gauge = lock(&connection.gauge);
    if gauge.idle_s(now) < SETTLED_S || gauge.has_moved(connection) || connection.may_pause() {
        let is_new = gauge.is_new();
        for (leg, socket, info) in gauge.sample(connection, &legs) {
            if is_new {
                relay.congestion.settle(socket, &info);
                // The one that was accepted has it already.
                let _ = watch(socket, relay.user_timeout());
            }
            // Linux counts a closed window against TCP_USER_TIMEOUT even while the peer answers every probe (since 5.11), and
            // would cut a stream whose reader only pauses. So the time-out holds only while the peer takes data.
            let paused = info.send_window_bytes.is_some_and(|window| window < info.mss_bytes);
            if paused && info.unanswered_probes >= MANY_PROBES && info.last_ack_ms > relay.user_timeout_ms() {
                connection.cut(if leg == Leg::Lan { LAN_SILENT } else { WAN_SILENT });
            }
            connection.has_unsent(leg, info.notsent_bytes > 0);
            if connection.paused(leg, paused) {
                let timeout_ms = if paused { 0 } else { relay.user_timeout_ms() };
                let _ = rustix::net::sockopt::set_tcp_user_timeout(socket, timeout_ms);
            }
        }
    } else {
        gauge.rest();
    }
    let silent_for = |limit_s: f64| limit_s > 0.0 && gauge.idle_s(now) >= limit_s;
    // An end is no silence: whoever was silent before it gets the whole time to answer.
    let half_closed_s = connection.half_closed_for().map_or(0.0, |past| past.as_secs_f64());
    if half_closed_s >= relay.config.half_closed_s && silent_for(relay.config.half_closed_s) {
        connection.cut("half-closed");
    } else if silent_for(relay.config.idle_s) {
        connection.cut("idle");
    }
}
