//! The directory in which a gateway's relays are found: a control socket and an event log for each.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, NFS_SUPER_MAGIC, fcntl_lock, fstatfs};
use rustix::process::{Flock, FlockType, fcntl_getlk};

use crate::config::RelayId;

/// The process works inside the directory from `enter` on, so that names in it are short: a Unix socket's path ends at 107 bytes.
pub struct RuntimeDir(());

impl RuntimeDir {
    /// `--runtime-dir`, else the environment, else the user's own place.
    pub fn choose(argument: Option<PathBuf>) -> PathBuf {
        let named = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        argument
            .or_else(|| named("S2DS_RUNTIME_DIR"))
            .or_else(|| named("XDG_RUNTIME_DIR").map(|dir| dir.join("scistream")))
            .unwrap_or_else(|| {
                PathBuf::from(format!("/tmp/scistream-{}", rustix::process::geteuid().as_raw()))
            })
    }

    /// Makes the directory 0700 if it is not there, refuses one that others could write into or read, and changes into it.
    pub fn enter(path: &Path) -> Result<RuntimeDir, String> {
        let told = |error: io::Error| format!("runtime directory {}: {error}", path.display());
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(told)?;
        }
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(told(error)),
            _ => {}
        }
        let found = fs::symlink_metadata(path).map_err(told)?;
        let uid = rustix::process::geteuid().as_raw();
        if !found.is_dir() {
            return Err(format!("runtime directory {}: is not a directory", path.display()));
        }
        if found.uid() != uid {
            return Err(format!(
                "runtime directory {}: belongs to uid {}, not to {uid}",
                path.display(),
                found.uid()
            ));
        }
        if found.mode() & 0o077 != 0 {
            return Err(format!(
                "runtime directory {}: mode {:o} is open to others; chmod 700 it",
                path.display(),
                found.mode() & 0o777
            ));
        }
        std::env::set_current_dir(path).map_err(told)?;
        Ok(RuntimeDir(()))
    }

    pub fn socket(&self, relay_id: &RelayId) -> PathBuf {
        format!("{relay_id}.sock").into()
    }

    pub fn log(&self, relay_id: &RelayId) -> PathBuf {
        format!("{relay_id}.log").into()
    }

    /// Opens a new event log; two relays of one id cannot be.
    pub fn create_log(&self, relay_id: &RelayId) -> io::Result<File> {
        OpenOptions::new().append(true).create_new(true).mode(0o600).open(self.log(relay_id))
    }

    /// The process that holds the log of a relay, if one does: asked of the kernel, it wakes nobody. 0: one that cannot be
    /// seen from here.
    pub fn holder(&self, relay_id: &RelayId) -> Option<i32> {
        let log = File::open(self.log(relay_id)).ok().filter(keeps_locks)?;
        let lock = fcntl_getlk(&log, &Flock::from(FlockType::WriteLock)).ok()??;
        Some(rustix::process::Pid::as_raw(lock.pid))
    }

    /// Every relay that has left a socket or a log here, in order.
    pub fn relays(&self) -> io::Result<Vec<RelayId>> {
        let mut names = std::collections::BTreeSet::new();
        for entry in fs::read_dir(".")? {
            let name = entry?.file_name();
            if let Some((stem, "sock" | "log")) = name.to_str().and_then(|name| name.rsplit_once('.')) {
                names.insert(stem.to_owned());
            }
        }
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }
}

/// Holds the log that is our stdout for as long as this process lives. Where that cannot be, who asks for us connects.
pub fn hold_log() {
    let log = rustix::stdio::stdout();
    if keeps_locks(&log) {
        let _ = fcntl_lock(log, FlockOperation::NonBlockingLockExclusive);
    }
}

/// Not on NFS, where each lock is a question to a server that may not answer.
fn keeps_locks(file: &impl std::os::fd::AsFd) -> bool {
    fstatfs(file).is_ok_and(|system| system.f_type != NFS_SUPER_MAGIC)
}
