//! What this process uses, for `status` and the end record.

use std::fs;

use serde_json::{Value, json};

/// User and system CPU time of this process so far, in seconds.
pub fn cpu_s() -> f64 {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    used.tv_sec as f64 + used.tv_nsec as f64 / 1e9
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
