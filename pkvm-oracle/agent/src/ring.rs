//! io_uring with a buffer that is registered: the kernel pins its page once, and copies by an address of its own.

use std::ffi::c_long;
use std::os::fd::{AsRawFd, OwnedFd};

use pkvm_oracle::{Errno, Observation};

use crate::{fault, sys};

/// linux/io_uring.h: where the parts of the queues lie.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Offsets {
    _head: u32,
    tail: u32,
    _mask: u32,
    _entries: u32,
    /// Of answers: how many were lost.
    _flags: u32,
    /// Of answers: where they are.
    first: u32,
    _others: [u32; 2],
    _user_addr: u64,
}

#[repr(C)]
#[derive(Default)]
pub(crate) struct Params {
    _others: [u32; 10],
    submit: Offsets,
    complete: Offsets,
}

const REGISTER_BUFFERS: c_long = 0;
const READ_FIXED: u8 = 4;
const WRITE_FIXED: u8 = 5;
const WAIT: c_long = 1;
/// Where the kernel has the entries to be submitted; both queues are at 0.
const ENTRIES_AT: i64 = 0x1000_0000;
const PAGE: usize = 4096;

// An entry, and an answer.
const FD_AT: usize = 4;
const ADDRESS_AT: usize = 16;
const LEN_AT: usize = 24;
const RESULT_AT: usize = 8;

/// WRITE_FIXED of the byte there, to what is open for writing.
pub(crate) fn write_from(to: &OwnedFd, at: *mut u8) -> Result<isize, Errno> {
    ask(WRITE_FIXED, to, at)
}

/// READ_FIXED to the byte there.
pub(crate) fn read_to(from: &OwnedFd, at: *mut u8) -> Result<isize, Errno> {
    ask(READ_FIXED, from, at)
}

fn ask(what: u8, file: &OwnedFd, at: *mut u8) -> Result<isize, Errno> {
    let mut params = Params::default();
    let ring = sys::ring(1, &mut params)?;
    let vector = libc::iovec { iov_base: at.cast(), iov_len: 1 };
    sys::ring_register(&ring, REGISTER_BUFFERS, &vector)?;
    let (queues, entry) = (sys::map_at(PAGE, &ring, 0)?, sys::map_at(PAGE, &ring, ENTRIES_AT)?);
    let put = |start: usize, bytes: &[u8]| {
        for (nth, &byte) in bytes.iter().enumerate() {
            fault::store(entry.wrapping_add(start + nth), byte);
        }
    };
    put(0, &[what]);
    put(FD_AT, &file.as_raw_fd().to_ne_bytes());
    put(ADDRESS_AT, &(at.addr() as u64).to_ne_bytes());
    put(LEN_AT, &1_u32.to_ne_bytes());
    // The queue says 0, which is this entry; that it is there is said by the tail.
    sys::store_register(queues, params.submit.tail as usize, 1);
    sys::ring_enter(&ring, WAIT)?;
    let answer = queues.wrapping_add(params.complete.first as usize + RESULT_AT);
    let bytes = std::array::from_fn(|nth| match fault::load(answer.wrapping_add(nth)) {
        Observation::Byte(byte) => byte,
        _ => 0,
    });
    sys::unmap(entry, PAGE)?;
    sys::unmap(queues, PAGE)?;
    match i32::from_ne_bytes(bytes) {
        errno @ ..0 => Err(Errno(-errno)),
        nr => Ok(nr as isize),
    }
}
