//! What this process uses, for `status` and the end record.

use std::fs;

use serde_json::{Value, json};

/// User and system CPU time of this process so far, in seconds.
pub fn cpu_s() -> f64 {
    // Linux counts in /proc in 1/100 s on every platform this runs on (USER_HZ is part of the ABI).
    const TICKS_PER_S: f64 = 100.0;
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name in parentheses may hold anything; the fields after it are numbers. utime and stime are the 14th and 15th of all.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / TICKS_PER_S
}

/// Descriptors, pipes, resident memory and CPU time.
pub fn report() -> Value {
    let descriptors =
        fs::read_dir("/proc/self/fd").map(|entries| entries.count().saturating_sub(1)).unwrap_or(0);
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split_whitespace().nth(1).and_then(|field| field.parse::<usize>().ok()).unwrap_or(0);
    json!({
        "descriptors": descriptors,
        "pipes": crate::pipe::open_pipes(),
        "rss_bytes": pages * rustix::param::page_size(),
        "cpu_s": cpu_s(),
    })
}
