//! Pipes and buffers that are held only while bytes are in them: a few serve thousands of connections.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

/// One splice call moves at most this much; also the pipe size that is asked for.
pub const PIPE_BYTES: usize = 1 << 20;
/// Below this a pipe moves less per call than a buffer would.
const LEAST_PIPE_BYTES: usize = 64 << 10;
pub const BUFFER_BYTES: usize = 256 << 10;
pub const POOLED_PIPES: usize = 32;
const POOLED_BUFFERS: usize = 16;

static OPEN_PIPES: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static PIPES: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
    static BUFFERS: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// A pipe and what the kernel granted for it.
pub struct Pipe {
    pub read: OwnedFd,
    pub write: OwnedFd,
    pub granted_bytes: usize,
}

impl Pipe {
    /// Makes a pipe as large as this user may have. Linux gives an unprivileged user 64 MiB of pipe pages over all processes;
    /// beyond that, pipes are 8 KiB and growing them is EPERM.
    fn new() -> io::Result<Pipe> {
        let (read, write) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC)?;
        let granted_bytes = [PIPE_BYTES, PIPE_BYTES / 4, LEAST_PIPE_BYTES]
            .into_iter()
            .find_map(|size| fcntl_setpipe_size(&write, size).ok())
            .unwrap_or(0);
        OPEN_PIPES.fetch_add(1, Ordering::Relaxed);
        Ok(Pipe { read, write, granted_bytes })
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        OPEN_PIPES.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An empty pipe of this thread, or a new one. None when neither descriptors nor pipe pages are left: the caller copies.
pub fn take_pipe() -> Option<Pipe> {
    if let Some(pipe) = PIPES.with_borrow_mut(Vec::pop) {
        return Some(pipe);
    }
    Pipe::new().ok().filter(|pipe| pipe.granted_bytes >= LEAST_PIPE_BYTES)
}

/// Takes back a pipe that is EMPTY. One that still holds bytes must be dropped instead: they belong to somebody.
pub fn give_pipe(pipe: Pipe) {
    PIPES.with_borrow_mut(|pipes| {
        if pipes.len() < POOLED_PIPES {
            pipes.push(pipe);
        }
    });
}

/// A buffer of `BUFFER_BYTES`; its contents are whatever was in it.
pub fn take_buffer() -> Vec<u8> {
    BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; BUFFER_BYTES])
}

pub fn give_buffer(mut buffer: Vec<u8>) {
    buffer.resize(BUFFER_BYTES, 0);
    BUFFERS.with_borrow_mut(|buffers| {
        if buffers.len() < POOLED_BUFFERS {
            buffers.push(buffer);
        }
    });
}

/// How many pipes this process has open, for `status`.
pub fn open_pipes() -> usize {
    OPEN_PIPES.load(Ordering::Relaxed)
}
