//! A stream's rate, divided among its connections by what they need. The kernel does the pacing, on the socket that sends
//! into the WAN; this says how fast each may be until the next division, and whether what the far relay paces is to be gathered.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use s2ds_sys::{TcpInfo, set_max_pacing_rate, tcp_info};

use crate::connection::Connection;
use crate::gather::worth_lumps;
use crate::socket::TcpStream;

/// A connection that has used so much of its share, and has more to send, gets more.
const USED: f64 = 0.75;
/// What a socket may be behind its share because it sends whole segments: two of the longest that the kernel makes.
const LUMP_BYTES: f64 = 131_072.0;
/// The longest (`GSO_LEGACY_MAX_SIZE`).
const LONGEST_SEND_BYTES: u32 = 65_536;
/// Between two divisions.
pub const TICK: Duration = Duration::from_millis(100);
/// Room for one that has not used its share up: it may grow before the next division.
const ROOM: f64 = 1.25;
/// A reader that has taken nothing for so long needs nothing, whatever waits for it.
const STUCK_S: f64 = 1.0;
/// What was sent beyond the rate is saved again within this time, so that a second as a whole keeps to it; and what the kernel
/// was late with, because its timers had to wait for a processor, is made up for.
const EVENED_WITHIN_S: f64 = 0.3;
/// So much of what was not sent may be sent later: beyond it, it was not the kernel.
const LATE_S: f64 = 0.04;
/// What comes from the WAN uses the rate up if it is so much of it.
const FULL: f64 = 0.9;

/// What a connection did since the last division.
#[derive(Clone, Copy, Debug)]
struct Use {
    /// What it was allowed; 0 if it is new.
    share_bytes_per_s: f64,
    moved_bytes: f64,
    /// There is more to send than the socket has sent.
    unsent: bool,
    /// Its reader has taken nothing for long.
    stuck: bool,
    /// The kernel sends no less at once; it must not hold a socket that begins for longer than until the next division.
    lump_bytes: f64,
}

impl Use {
    fn waits(&self) -> bool {
        self.unsent && !self.stuck
    }
}

/// Keeps the shares of one relay's connections.
pub struct Pacer {
    shares: HashMap<u64, Share>,
    divided: Instant,
    /// Sent beyond the rate and not yet saved; below 0, not sent and to be made up for.
    debt_bytes: f64,
    /// By each connection, of the WAN.
    came_bytes: HashMap<u64, u64>,
}

struct Share {
    bytes_per_s: f64,
    acked_bytes: u64,
    /// When that was last seen to be more than before.
    acked: Instant,
}

impl Share {
    /// With a small share a socket may rightly be silent for long.
    fn is_stuck(&self, now: Instant, lump_bytes: f64) -> bool {
        (now - self.acked).as_secs_f64() > STUCK_S.max(2.0 * lump_bytes / self.bytes_per_s)
    }
}

/// What the kernel sends at once at least, whatever the rate: two segments, and the more the nearer the receiver is, up to the longest
/// (`tcp_tso_autosize`, since Linux 5.18).
fn lump_bytes(info: &TcpInfo) -> f64 {
    let near = LONGEST_SEND_BYTES >> (info.min_rtt_us >> 9).min(31);
    f64::from((2 * info.mss_bytes + near).min(LONGEST_SEND_BYTES))
}

/// What a connection may send from its first byte until the next division.
pub fn begin(wan: &TcpStream, rate_mbits_per_s: u64, connections: usize) {
    let rate = rate_mbits_per_s as f64 * 125_000.0;
    let least = tcp_info(wan).map_or(0.0, |info| lump_bytes(&info)) / TICK.as_secs_f64();
    let share = (rate / connections.max(1) as f64).max(least).min(rate);
    let _ = set_max_pacing_rate(wan, share as u64);
}

impl Pacer {
    pub fn new(now: Instant) -> Pacer {
        Pacer { shares: HashMap::new(), divided: now, debt_bytes: 0.0, came_bytes: HashMap::new() }
    }

    /// Sets what each connection may send from now on, and what it gathers; 0 is no limit. To be called at least every 100 ms
    /// while there is one, and once when it has been lifted.
    pub fn pace(&mut self, now: Instant, connections: &[Arc<Connection>], rate_mbits_per_s: u64) {
        let elapsed_s = (now - self.divided).as_secs_f64();
        let first = elapsed_s <= 0.0;
        self.divided = now;
        let before = std::mem::take(&mut self.shares);
        let mut uses = Vec::with_capacity(connections.len());
        let mut all_legs = Vec::with_capacity(connections.len());
        for connection in connections {
            let Some(legs) = connection.legs() else { continue };
            // A socket that has just been closed has neither.
            let Ok(info) = tcp_info(&legs.wan) else { continue };
            if rate_mbits_per_s == 0 {
                let _ = set_max_pacing_rate(&legs.wan, u64::MAX);
                continue;
            }
            let share = before.get(&connection.id);
            // One that is new here has begun since the last division.
            let moved = info.acked_bytes.saturating_sub(share.map_or(0, |share| share.acked_bytes));
            uses.push(Use {
                share_bytes_per_s: share.map_or(0.0, |share| share.bytes_per_s),
                moved_bytes: moved as f64,
                unsent: info.notsent_bytes > 0,
                stuck: share.is_some_and(|share| share.is_stuck(now, lump_bytes(&info))),
                lump_bytes: lump_bytes(&info),
            });
            let acked = share.filter(|_| moved == 0).map_or(now, |share| share.acked);
            all_legs.push((connection.id, legs, info.acked_bytes, acked));
        }
        let rate = rate_mbits_per_s as f64 * 125_000.0;
        self.gather(connections, rate, elapsed_s);
        if rate_mbits_per_s == 0 {
            return;
        }
        // Nobody has sent anything of this rate yet.
        if first {
            for (id, legs, acked_bytes, acked) in all_legs {
                begin(&legs.wan, rate_mbits_per_s, connections.len());
                self.shares
                    .insert(id, Share { bytes_per_s: rate / connections.len() as f64, acked_bytes, acked });
            }
            return;
        }
        let moved: f64 = uses.iter().map(|one| one.moved_bytes).sum();
        let debt = self.debt_bytes + moved - rate * elapsed_s;
        // Who has nothing to send is not late.
        let late = if uses.iter().any(Use::waits) { rate * LATE_S + LUMP_BYTES } else { 0.0 };
        self.debt_bytes = debt.clamp(-late, rate * EVENED_WITHIN_S + LUMP_BYTES);
        // Up to a lump it is chance.
        let certain = self.debt_bytes - self.debt_bytes.clamp(-LUMP_BYTES, LUMP_BYTES);
        let to_divide = (rate - certain / EVENED_WITHIN_S).max(rate / 2.0);
        let shares = divide(to_divide, elapsed_s, &uses);
        for ((id, legs, acked_bytes, acked), bytes_per_s) in all_legs.into_iter().zip(shares) {
            let _ = set_max_pacing_rate(&legs.wan, bytes_per_s as u64);
            self.shares.insert(id, Share { bytes_per_s, acked_bytes, acked });
        }
    }

    /// The far relay paces the other direction: while that brings all that it may, more of it is waited for.
    fn gather(&mut self, connections: &[Arc<Connection>], rate: f64, elapsed_s: f64) {
        let before = std::mem::take(&mut self.came_bytes);
        if worth_lumps(rate) == 0 {
            return connections.iter().for_each(|connection| connection.gather(0));
        }
        let mut came = Vec::with_capacity(connections.len());
        for connection in connections {
            let bytes = connection.wan_to_lan().bytes();
            // One that is new here is looked at once more.
            came.push((bytes - before.get(&connection.id).unwrap_or(&bytes)) as f64);
            self.came_bytes.insert(connection.id, bytes);
        }
        let full = elapsed_s > 0.0 && came.iter().sum::<f64>() >= FULL * rate * elapsed_s;
        for (connection, came_bytes) in connections.iter().zip(came) {
            connection.gather(if full { worth_lumps(came_bytes / elapsed_s) } else { 0 });
        }
    }
}

/// Shares in bytes per second. Those that want more than they had divide what the others leave, evenly. Each of the others
/// has what it has just used and some room, at least an even part of everything to begin with: should it begin, the next
/// division counts it.
fn divide(rate: f64, elapsed_s: f64, uses: &[Use]) -> Vec<f64> {
    let even = rate / uses.len() as f64;
    let wants_more = |one: &Use| {
        let had = if one.share_bytes_per_s > 0.0 { one.share_bytes_per_s } else { even };
        one.waits() && one.moved_bytes + LUMP_BYTES >= USED * had * elapsed_s
    };
    let needs = |one: &Use| one.moved_bytes / elapsed_s * ROOM;
    let mut modest: Vec<f64> = uses.iter().filter(|one| !wants_more(one)).map(needs).collect();
    modest.sort_by(f64::total_cmp);
    let (mut left, mut sharers) = (rate, uses.len());
    for need in modest {
        left -= need.min(left / sharers as f64);
        sharers -= 1;
    }
    uses.iter()
        .map(|one| {
            // One that goes on is early or late by a lump; one that begins would be held by its first.
            let least = if one.unsent { 0.0 } else { one.lump_bytes / elapsed_s };
            let share = if wants_more(one) { left / sharers as f64 } else { needs(one).max(even).max(least) };
            share.min(rate)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Role;

    const RATE: f64 = 125e6;
    const TICK_S: f64 = 0.1;

    fn used(share: f64, part: f64, waits: bool) -> Use {
        let moved_bytes = share * part * TICK_S;
        Use { share_bytes_per_s: share, moved_bytes, unsent: waits, stuck: false, lump_bytes: 3000.0 }
    }

    #[test]
    fn one_that_wants_more_gets_what_idle_ones_leave() {
        let mut uses = vec![used(RATE / 8.0, 0.0, false); 7];
        uses.push(used(RATE / 8.0, 1.0, true));
        let shares = divide(RATE, TICK_S, &uses);
        assert_eq!(shares[7], RATE);
        assert!(shares[..7].iter().all(|share| *share == RATE / 8.0));
    }

    #[test]
    fn ones_that_say_a_little_all_the_time_take_no_more_than_that() {
        let mut uses = vec![used(RATE / 8.0, 0.01, false); 7];
        uses.push(used(RATE / 8.0, 1.0, true));
        assert!(divide(RATE, TICK_S, &uses)[7] > 0.98 * RATE);
    }

    #[test]
    fn those_that_want_more_share_evenly_and_keep_to_the_rate() {
        let new = Use { share_bytes_per_s: 0.0, ..used(RATE / 3.0, 1.0, true) };
        let uses = [used(RATE, 0.9, true), used(RATE / 4.0, 0.8, true), new];
        assert_eq!(divide(RATE, TICK_S, &uses), [RATE / 3.0; 3]);
    }

    #[test]
    fn one_whose_network_takes_less_leaves_the_rest() {
        let uses = [used(RATE / 2.0, 0.2, true), used(RATE / 2.0, 1.0, true)];
        let shares = divide(RATE, TICK_S, &uses);
        assert!(shares[1] > 0.85 * RATE && shares[1] < RATE);
    }

    #[test]
    fn the_only_one_has_the_whole_rate_whatever_it_does() {
        for (part, waits) in [(0.0, false), (0.5, false), (1.0, true)] {
            assert_eq!(divide(RATE, TICK_S, &[used(RATE, part, waits)]), [RATE]);
        }
    }

    #[test]
    fn a_lump_is_long_where_the_receiver_is_near_and_two_segments_where_it_is_far() {
        let at = |min_rtt_us| lump_bytes(&TcpInfo { min_rtt_us, mss_bytes: 1448, ..TcpInfo::default() });
        assert_eq!([at(50), at(50_000)], [65_536.0, 2896.0]);
    }

    #[test]
    fn one_with_a_small_share_is_not_stuck_while_its_lumps_are_due() {
        let acked = Instant::now();
        let after_2_s = acked + Duration::from_secs(2);
        let of = |bytes_per_s| Share { bytes_per_s, acked_bytes: 0, acked }.is_stuck(after_2_s, 65_536.0);
        assert_eq!([of(30_000.0), of(1e6)], [false, true]);
    }

    /// Whether each of some connections gathers, after these bytes have come by each in a tenth of a second.
    fn gathers(rate: f64, came_bytes: &[usize]) -> Vec<bool> {
        let source = "127.0.0.1:1".parse().unwrap();
        let connections: Vec<_> = (0..came_bytes.len() as u64)
            .map(|id| Arc::new(Connection::new(id, 0, source, Role::Cons)))
            .collect();
        let mut pacer = Pacer::new(Instant::now());
        pacer.gather(&connections, rate, TICK_S);
        for (connection, bytes) in connections.iter().zip(came_bytes) {
            connection.wan_to_lan().add(*bytes);
        }
        pacer.gather(&connections, rate, TICK_S);
        connections.iter().map(|connection| connection.gathers() > 0).collect()
    }

    #[test]
    fn a_stream_that_uses_its_rate_up_gathers_where_much_comes_and_no_other_does() {
        let allowed = RATE * TICK_S;
        let [all, most, little] = [1.0, 0.95, 0.05].map(|part| (part * allowed) as usize);
        assert_eq!(gathers(RATE, &[all]), [true]);
        assert_eq!(gathers(RATE, &[most, little]), [true, false]);
        assert_eq!(gathers(RATE, &[all * 8 / 10, little]), [false, false]);
        assert_eq!(gathers(RATE / 10.0, &[all]), [false]);
        assert_eq!(gathers(0.0, &[all]), [false]);
    }

    #[test]
    fn one_that_is_to_begin_is_not_held_by_its_first_lump_past_the_next_division() {
        let uses = vec![used(1000.0, 0.0, false); 100];
        assert!(divide(100_000.0, TICK_S, &uses).iter().all(|share| share * TICK_S >= 3000.0));
    }
}
