//! Bytes in and out of an arena, never borrowed.
//!
//! Guests, devices and other threads change these bytes at any time, so nobody gets a reference. What
//! orders a copy with a conversion is the subpage's word, not the copy. How bytes are copied, and what becomes
//! of a copy whose memory is gone, is in `os/recoverable`; here is what may be copied.

// UNSAFETY: raw pointers into the arena. Offsets are checked against its size right here.
#![expect(unsafe_code, reason = "guest memory can only be reached through raw pointers")]

use super::Arena;
use crate::addr::{ByteSize, Pa, Pfn};
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::geometry::{PAGE_BYTES, index};
use crate::os::file_io::Target;
use crate::os::recoverable::{self, Fault};
use crate::os::sigbus::FaultCause;
use crate::range::PfnRange;

const WORD: usize = size_of::<u64>();

/// The error of an access whose memory is gone.
#[cold]
fn gone(op: Op, fault: Fault) -> Error {
    let error = Error::new(op, ErrorKind::MemoryFailure);
    match fault.cause {
        FaultCause::MemoryFailure => error.because("a hardware error (BUS_MCEERR_AR)"),
        // As storage that fails. EFAULT says private.
        _ => error.errno_is(Errno::EIO).because("the pool's file has lost it (BUS_ADRERR)"),
    }
}

impl Arena {
    /// Where the byte at `at` is, after checking that `len` bytes from there on are the arena's. So are the
    /// words that hold them: the arena is made of whole pages. That they lie in no gap between two parts is not
    /// checked: no frame of a gap is ever given to anybody.
    #[inline]
    fn at(&self, op: Op, at: Pa, len: usize) -> Result<*mut u8, Error> {
        let size = ByteSize::from_pages(self.nr_pages).get();
        match at.get().checked_add(len as u64) {
            Some(end) if end <= size => Ok(self.base().as_ptr().wrapping_add(index(at.get()))),
            _ => Err(Error::new(op, ErrorKind::OutOfRange)),
        }
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`]; [`ErrorKind::MemoryFailure`]: the buffer has some of the bytes then.
    #[inline]
    pub(crate) fn read(&self, at: Pa, buf: &mut [u8]) -> Result<(), Error> {
        let from = self.at(Op::Read, at, buf.len())?;
        // SAFETY: `at` has checked that the bytes, and the words that hold them, are the arena's.
        unsafe { recoverable::copy_out(from, buf) }.map_err(|fault| gone(Op::Read, fault))
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`]; [`ErrorKind::MemoryFailure`]: some of the bytes are written then.
    #[inline]
    pub(crate) fn write(&self, at: Pa, buf: &[u8]) -> Result<(), Error> {
        let to = self.at(Op::Write, at, buf.len())?;
        // SAFETY: as in `read`.
        unsafe { recoverable::copy_in(to, buf) }.map_err(|fault| gone(Op::Write, fault))
    }

    /// Fills whole frames with zeroes.
    pub(crate) fn zero(&self, frames: PfnRange) -> Result<(), Error> {
        let (to, len) = self.bytes_of(Op::Write, frames)?;
        // SAFETY: `bytes_of` has checked that these are whole frames, and backed.
        unsafe { recoverable::zero(to, len) }.map_err(|fault| gone(Op::Write, fault))
    }

    /// Whether whole frames are all zeroes.
    pub(crate) fn is_zero(&self, frames: PfnRange) -> Result<bool, Error> {
        let (from, len) = self.bytes_of(Op::Read, frames)?;
        // SAFETY: as in `zero`.
        unsafe { recoverable::is_zero(from, len) }.map_err(|fault| gone(Op::Read, fault))
    }

    /// Fills whole frames with zeroes, as fast as the machine can. They are the caller's alone: no
    /// access section, view, guest or subscriber reaches them, and whoever did before has left them in
    /// a way that orders what it did with what the caller does. Others need [`Arena::zero`].
    pub(crate) fn scrub(&self, frames: PfnRange) -> Result<(), Error> {
        let (to, len) = self.bytes_of(Op::Write, frames)?;
        // SAFETY: as in `zero`, and the frames are the caller's alone.
        unsafe { recoverable::scrub(to, len) }.map_err(|fault| gone(Op::Write, fault))
    }

    /// Copies whole frames to others, as fast as the machine can. Both are the caller's alone, as for
    /// [`Arena::scrub`].
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`]; [`ErrorKind::Unsupported`] if they overlap; [`ErrorKind::MemoryFailure`].
    pub(crate) fn copy_frames(&self, from: PfnRange, to: Pfn) -> Result<(), Error> {
        let target = PfnRange::new(to, from.nr_pages()).map_err(|error| error.of(Op::Write))?;
        if from.intersection(&target).is_some() {
            return Err(Error::new(Op::Write, ErrorKind::Unsupported)
                .because("frames are copied to others, not onto themselves"));
        }
        let (source, len) = self.bytes_of(Op::Read, from)?;
        let (target, _) = self.bytes_of(Op::Write, target)?;
        // SAFETY: as in `scrub`, for both; they do not overlap, as checked above.
        unsafe { recoverable::copy_frames(source, target, len) }
            .map_err(|fault| gone(Op::Write, fault))
    }

    /// `len` bytes of the frames, from their byte `skip` on, for the kernel to write to or read.
    pub(crate) fn target(
        &self,
        frames: PfnRange,
        skip: usize,
        len: usize,
    ) -> Result<Target<'_>, Error> {
        let (start, size) = self.bytes_of(Op::Write, frames)?;
        if skip.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::new(Op::Write, ErrorKind::OutOfRange));
        }
        // SAFETY: 1. `bytes_of` has checked that all of the frames are backed, and the piece borrows
        // the arena, so they stay mapped. 2. whoever else reaches them does so outside of Rust.
        Ok(unsafe { Target::new(start.wrapping_add(skip), len) })
    }

    fn bytes_of(&self, op: Op, frames: PfnRange) -> Result<(*mut u8, usize), Error> {
        if !self.backs(frames) {
            return Err(Error::new(op, ErrorKind::OutOfRange));
        }
        let len = index(frames.nr_pages()) * PAGE_BYTES;
        Ok((self.at(op, frames.start().pa(), len)?, len))
    }

    /// An atomic load; sequentially consistent, because a guest may rely on it with its own.
    #[inline]
    pub(crate) fn load_u64(&self, at: Pa) -> Result<u64, Error> {
        let at = self.word(at)?;
        // SAFETY: `word` has checked that it is the arena's, and aligned.
        unsafe { recoverable::load_ordered(at) }.map_err(|fault| gone(Op::Atomic, fault))
    }

    /// An atomic store.
    pub(crate) fn store_u64(&self, at: Pa, value: u64) -> Result<(), Error> {
        let at = self.word(at)?;
        // SAFETY: as in `load_u64`.
        unsafe { recoverable::store_ordered(at, value) }.map_err(|fault| gone(Op::Atomic, fault))
    }

    /// An atomic compare-and-exchange; returns what was found.
    pub(crate) fn compare_exchange_u64(
        &self,
        at: Pa,
        current: u64,
        new: u64,
    ) -> Result<Result<u64, u64>, Error> {
        let at = self.word(at)?;
        // SAFETY: as in `load_u64`.
        let found = unsafe { recoverable::compare_exchange(at, current, new) }
            .map_err(|fault| gone(Op::Atomic, fault))?;
        Ok(if found == current { Ok(found) } else { Err(found) })
    }

    #[inline]
    fn word(&self, at: Pa) -> Result<*mut u8, Error> {
        let target = self.at(Op::Atomic, at, WORD)?;
        match target.addr() % WORD {
            0 => Ok(target),
            _ => Err(Error::new(Op::Atomic, ErrorKind::Unaligned)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Pfn;

    #[test]
    fn copies_of_any_alignment_arrive_and_touch_nothing_else() {
        let arena = Arena::heap(1).unwrap();
        let data: Vec<u8> = (1..=40).collect();
        for start in 0..17 {
            for len in 0..40 {
                arena.write(Pa::new(0), &[0xee; 64]).unwrap();
                arena.write(Pa::new(start as u64), &data[..len]).unwrap();
                let mut all = [0; 64];
                arena.read(Pa::new(0), &mut all).unwrap();
                let mut wanted = [0xee; 64];
                wanted[start..start + len].copy_from_slice(&data[..len]);
                assert_eq!(all, wanted, "start {start} len {len}");
                let mut part = vec![0; len];
                arena.read(Pa::new(start as u64), &mut part).unwrap();
                assert_eq!(part, data[..len], "start {start} len {len}");
            }
        }
        let end = Pa::new(4096 - 3);
        arena.write(end, b"end").unwrap();
        let mut part = [0; 3];
        arena.read(end, &mut part).unwrap();
        assert_eq!(&part, b"end");
    }

    /// Long ones are copied by other instructions, and by which depends on how both sides are aligned.
    #[test]
    fn long_copies_arrive_from_anywhere_to_anywhere() {
        let arena = Arena::heap(2).unwrap();
        let data: Vec<u8> = (0..2000_u32).map(|at| (at % 251) as u8).collect();
        let lens =
            if cfg!(miri) { &[511, 520][..] } else { &[40, 255, 511, 512, 513, 519, 520, 1999] };
        let skips = if cfg!(miri) { &[0, 3][..] } else { &[0, 1, 2, 3, 4, 5, 6, 7, 8] };
        for &len in lens {
            for (start, &skip) in skips.iter().flat_map(|s| skips.iter().map(move |o| (*s, o))) {
                arena.write(Pa::new(0), &[0xee; 4096]).unwrap();
                let source = &data[..len];
                let mut buffer = vec![0; skip + len];
                buffer[skip..].copy_from_slice(source);
                arena.write(Pa::new(16 + start as u64), &buffer[skip..]).unwrap();
                let mut all = vec![0; skip + 4096];
                arena.read(Pa::new(0), &mut all[skip..]).unwrap();
                let mut wanted = [0xee; 4096];
                wanted[16 + start..16 + start + len].copy_from_slice(source);
                assert_eq!(all[skip..], wanted, "start {start} skip {skip} len {len}");
                buffer.fill(0);
                arena.read(Pa::new(16 + start as u64), &mut buffer[skip..]).unwrap();
                assert_eq!(buffer[skip..], *source, "start {start} skip {skip} len {len}");
                assert!(buffer[..skip].iter().all(|&byte| byte == 0));
            }
        }
    }

    #[test]
    fn one_bit_anywhere_in_a_frame_is_seen() {
        let arena = Arena::heap(2).unwrap();
        let frames = PfnRange::new(Pfn::new(0), 2).unwrap();
        let step = if cfg!(miri) { 1021 } else { 7 };
        for at in (0..8192).step_by(step) {
            arena.zero(frames).unwrap();
            assert!(arena.is_zero(frames).unwrap());
            arena.write(Pa::new(at), &[0x80]).unwrap();
            assert!(!arena.is_zero(frames).unwrap(), "at {at}");
        }
    }

    /// Who reads a number while it is written finds one or the other.
    #[test]
    fn aligned_numbers_are_not_torn() {
        let arena = Arena::heap(1).unwrap();
        let rounds: u32 = if cfg!(miri) { 3 } else { 20_000 };
        for (at, len) in [(8, 2), (10, 2), (12, 4), (20, 4), (24, 8), (32, 64), (128, 2048)] {
            arena.write(Pa::new(at), &vec![0; len]).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    for round in 0..rounds {
                        arena.write(Pa::new(at), &vec![(round % 2) as u8 * 0xff; len]).unwrap();
                    }
                });
                let mut buf = vec![0_u8; len];
                for _ in 0..rounds {
                    arena.read(Pa::new(at), &mut buf).unwrap();
                    for word in buf.chunks(WORD) {
                        assert!(
                            word.iter().all(|&byte| byte == word[0]),
                            "{len} at {at}: {word:?}"
                        );
                    }
                }
            });
        }
    }

    #[test]
    fn neighbours_in_a_word_do_not_lose_each_others_bytes() {
        let arena = Arena::heap(1).unwrap();
        let rounds = if cfg!(miri) { 20 } else { 5_000 };
        std::thread::scope(|scope| {
            for byte in 0..2 {
                let arena = &arena;
                scope.spawn(move || {
                    for round in 1..=rounds {
                        let value = (round % 251) as u8;
                        arena.write(Pa::new(byte), &[value]).unwrap();
                        let mut seen = [0];
                        arena.read(Pa::new(byte), &mut seen).unwrap();
                        assert_eq!(seen, [value]);
                    }
                });
            }
        });
    }

    #[test]
    fn nothing_beyond_the_arena_is_reached() {
        let arena = Arena::heap(1).unwrap();
        let mut byte = [0];
        for at in [4096, u64::MAX] {
            let error = arena.read(Pa::new(at), &mut byte).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfRange);
            assert!(arena.write(Pa::new(at), &byte).is_err());
            assert!(arena.load_u64(Pa::new(at & !7)).is_err());
        }
        assert!(arena.zero(PfnRange::new(Pfn::new(0), 2).unwrap()).is_err());
        assert_eq!(Arena::heap(0).unwrap_err().kind(), ErrorKind::InvalidSize);
        assert_eq!(Arena::heap(u64::MAX).unwrap_err().kind(), ErrorKind::InvalidSize);
    }

    #[test]
    fn atomics_must_be_aligned() {
        let arena = Arena::heap(1).unwrap();
        assert_eq!(arena.load_u64(Pa::new(4)).unwrap_err().kind(), ErrorKind::Unaligned);
        arena.store_u64(Pa::new(8), 7).unwrap();
        assert_eq!(arena.compare_exchange_u64(Pa::new(8), 7, 9).unwrap(), Ok(7));
        assert_eq!(arena.compare_exchange_u64(Pa::new(8), 7, 9).unwrap(), Err(9));
    }

    #[test]
    fn what_is_nobody_elses_is_scrubbed_and_copied() {
        let arena = Arena::heap(6).unwrap();
        let frames = |start, nr_pages| PfnRange::new(Pfn::new(start), nr_pages).unwrap();
        for page in 0..6 {
            arena.write(Pfn::new(page).pa(), &[0x10 + page as u8; PAGE_BYTES]).unwrap();
        }
        arena.copy_frames(frames(0, 2), Pfn::new(3)).unwrap();
        arena.scrub(frames(1, 1)).unwrap();
        let first = |page| {
            let mut bytes = [0; PAGE_BYTES];
            arena.read(Pfn::new(page).pa(), &mut bytes).unwrap();
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page}");
            bytes[0]
        };
        assert_eq!((0..6).map(first).collect::<Vec<_>>(), [0x10, 0, 0x12, 0x10, 0x11, 0x15]);
        assert!(arena.is_zero(frames(1, 1)).unwrap() && !arena.is_zero(frames(1, 2)).unwrap());

        let kind = |result: Result<(), Error>| result.unwrap_err().kind();
        assert_eq!(kind(arena.copy_frames(frames(0, 2), Pfn::new(1))), ErrorKind::Unsupported);
        assert_eq!(kind(arena.copy_frames(frames(0, 2), Pfn::new(5))), ErrorKind::OutOfRange);
        assert_eq!(kind(arena.copy_frames(frames(5, 2), Pfn::new(0))), ErrorKind::OutOfRange);
        assert_eq!(kind(arena.copy_frames(frames(0, 2), Pfn::new(u64::MAX))), ErrorKind::Overflow);
        assert_eq!(kind(arena.scrub(frames(5, 2))), ErrorKind::OutOfRange);
    }
}
