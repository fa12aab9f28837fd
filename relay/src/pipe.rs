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
/// Of these each worker is sure, however few descriptors there are.
pub const LEAST_PIPES: usize = 8;
const POOLED_PIPES: usize = 32;
const POOLED_BUFFERS: usize = 16;

static OPEN_PIPES: AtomicUsize = AtomicUsize::new(0);
static MOST_PIPES: AtomicUsize = AtomicUsize::new(usize::MAX);
/// By each worker, empty ones.
static MOST_KEPT: AtomicUsize = AtomicUsize::new(POOLED_PIPES);

thread_local! {
    static PIPES: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
    static BUFFERS: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// From now on no more than `most` pipes are open at once, in all workers together: other descriptors are for connections.
pub fn allow(most: usize, workers: usize) {
    MOST_PIPES.store(most, Ordering::Relaxed);
    MOST_KEPT.store(POOLED_PIPES.min(most / workers), Ordering::Relaxed);
}

/// A pipe and what the kernel granted for it.
pub struct Pipe {
    pub read: OwnedFd,
    pub write: OwnedFd,
    pub granted_bytes: usize,
    _place: Place,
}

/// One of the pipes that may be open, until it is dropped.
struct Place;

impl Place {
    fn take() -> Option<Place> {
        let most = MOST_PIPES.load(Ordering::Relaxed);
        let one_more = |open| (open < most).then_some(open + 1);
        OPEN_PIPES.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok().map(|_| Place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        OPEN_PIPES.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pipe {
    /// Makes a pipe as large as this user may have. Linux gives an unprivileged user 64 MiB of pipe pages over all processes;
    /// beyond that, pipes are 8 KiB and growing them is EPERM.
    fn new(place: Place) -> io::Result<Pipe> {
        let (read, write) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC)?;
        let granted_bytes = [PIPE_BYTES, PIPE_BYTES / 4, LEAST_PIPE_BYTES]
            .into_iter()
            .find_map(|size| fcntl_setpipe_size(&write, size).ok())
            .unwrap_or(0);
        Ok(Pipe { read, write, granted_bytes, _place: place })
    }
}

/// An empty pipe of this thread, or a new one. None when there may be no more, or no pipe pages are left: the caller copies.
pub fn take_pipe() -> Option<Pipe> {
    if let Some(pipe) = PIPES.with_borrow_mut(Vec::pop) {
        return Some(pipe);
    }
    Pipe::new(Place::take()?).ok().filter(|pipe| pipe.granted_bytes >= LEAST_PIPE_BYTES)
}

/// Takes back a pipe that is EMPTY. One that still holds bytes must be dropped instead: they belong to somebody.
pub fn give_pipe(pipe: Pipe) {
    PIPES.with_borrow_mut(|pipes| {
        if pipes.len() < MOST_KEPT.load(Ordering::Relaxed) {
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
