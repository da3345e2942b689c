//! A thread of the host that goes at the guest's memory while requests are in flight.
//!
//! Each attempt on a protected guest does three things. It orders a conversion of pages that the
//! device has pinned, which has to be refused with the right page and the right owner. It touches
//! private memory through a raw address, which has to end in a SIGBUS with exactly that address. And
//! it reads private memory by the checked way, which has to end in an error.
//!
//! A guest that is not protected has no private memory. There it punches the pages that the device
//! has pinned, tries to make others private, which has to be refused too, and sees that it can touch
//! whatever it likes.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gmem::addr::{Access, ByteSize, Hva, Offset, Pgoff};
use gmem::error::{Error, ErrorKind, Found};
use gmem::geometry::PAGE_SIZE;
use gmem::hyp::VmKind;
use gmem::range::PgoffRange;
use gmem::{
    ContentPolicy, FaultCause, GuestMemfd, HostView, PageInfo, SigbusHandler, Touch, Visibility,
};

use crate::Fallible;
use crate::console::Console;
use crate::device::OWNER;
use crate::layout::{self, PAYLOAD, QUEUE, RAM, RAM_BYTES, RING, params};
use crate::run::{Run, lock};

/// Guest addresses that a protected guest has to itself throughout; it has never touched the last of them.
const UNSHARED: [u64; 4] = [params::BASE, PAYLOAD + 5, RING + 4096 + 77, RAM + RAM_BYTES - 1];

/// A buffer that is pinned right now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attempt {
    start: u64,
    len: u64,
}

impl Attempt {
    /// The buffer at a guest address.
    pub(crate) fn on(start: u64, len: u64) -> Self {
        Self { start, len }
    }

    /// The pages of the object that are pinned, in whole units.
    fn pages(self, unit: ByteSize) -> Option<PgoffRange> {
        let first = layout::offset_of(self.start)?.get();
        let last = layout::offset_of(self.start.checked_add(self.len)?.checked_sub(1)?)?.get();
        let start = first - first % unit.get();
        let end = last.checked_add(1)?.next_multiple_of(unit.get());
        PgoffRange::from_bytes(Offset::new(start), ByteSize::from_bytes(end - start)).ok()
    }
}

/// What was tried, and came out as it should.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct IntruderStat {
    pub(crate) busy_refused: u64,
    pub(crate) sigbus: u64,
    pub(crate) reads_refused: u64,
    /// Conversions to private of what a guest that is not protected has.
    pub(crate) private_refused: u64,
    /// Touches of such memory that went through.
    pub(crate) open_touches: u64,
}

/// The device's end: asks for an attempt and waits until it is over.
#[derive(Debug)]
pub(crate) struct Intruder {
    attempts: Sender<Attempt>,
    done: Mutex<Receiver<()>>,
}

/// The thread's end.
#[derive(Debug)]
pub(crate) struct Intrusion {
    pub(crate) kind: VmKind,
    pub(crate) memfd: GuestMemfd,
    pub(crate) view: Arc<HostView>,
    pub(crate) sigbus: SigbusHandler,
    pub(crate) console: Arc<Console>,
    pub(crate) run: Arc<Run>,
    /// In which units the device pins memory.
    pub(crate) unit: ByteSize,
}

/// The memory as it was during an attempt.
pub(crate) type Snapshot = Vec<(PgoffRange, PageInfo)>;

/// The two ends of a line to the intruder.
pub(crate) fn line() -> (Intruder, (Receiver<Attempt>, Sender<()>)) {
    let (attempts, attempts_out) = channel();
    let (done_in, done) = channel();
    (Intruder { attempts, done: Mutex::new(done) }, (attempts_out, done_in))
}

impl Intruder {
    /// Returns when the attempt is over, or the run is.
    pub(crate) fn attempt(&self, run: &Run, attempt: Attempt) {
        if self.attempts.send(attempt).is_err() {
            return;
        }
        let done = lock(&self.done);
        while run.check().is_ok() {
            match done.recv_timeout(Duration::from_millis(100)) {
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

impl Intrusion {
    /// Tries until the device is gone; returns what was refused, and what the memory looked like
    /// during the last attempt.
    pub(crate) fn serve(
        self,
        attempts: &Receiver<Attempt>,
        done: &Sender<()>,
    ) -> Fallible<(IntruderStat, Snapshot)> {
        let mut stat = IntruderStat::default();
        let mut snapshot = Snapshot::new();
        loop {
            match attempts.recv_timeout(Duration::from_millis(200)) {
                Ok(attempt) => {
                    let first = stat.busy_refused == 0;
                    let said = self.attack(attempt, &mut stat)?;
                    if first {
                        said.iter().for_each(|line| self.console.say("intruder", line));
                    }
                    snapshot = self.memfd.snapshot(self.memfd.pages())?.collect();
                    self.run.beat();
                    // A device that does not wait any more has lost the run.
                    let _ = done.send(());
                }
                Err(RecvTimeoutError::Disconnected) => return Ok((stat, snapshot)),
                Err(RecvTimeoutError::Timeout) => self.run.check()?,
            }
        }
    }

    /// One of each; returns what to say about it.
    fn attack(&self, attempt: Attempt, stat: &mut IntruderStat) -> Fallible<Vec<String>> {
        let pinned = attempt.pages(self.unit).ok_or("the device pinned what is no guest memory")?;
        let refused = self.take_pinned(pinned)?;
        stat.busy_refused += 1;
        let mut said = vec![format!("tried: {refused}")];
        match self.kind {
            VmKind::Protected => self.go_at_private(stat, &mut said)?,
            VmKind::NonProtected => self.go_at_open(stat, &mut said)?,
        }
        Ok(said)
    }

    fn go_at_private(&self, stat: &mut IntruderStat, said: &mut Vec<String>) -> Fallible<()> {
        for (i, ipa) in UNSHARED.into_iter().enumerate() {
            let at = layout::offset(ipa)?;
            for access in [Access::Read, Access::Write] {
                let hva = self.touch_private(at, access)?;
                stat.sigbus += 1;
                if i == 0 && access == Access::Read {
                    said.push(format!("touched private memory at {hva}: SIGBUS at {hva}"));
                }
            }
            let error = self.read_private(at)?;
            stat.reads_refused += 1;
            if i == 0 {
                said.push(format!("tried: {error}"));
            }
        }
        // So that the above is no proof that nothing can be touched at all.
        self.touch_open(QUEUE)
    }

    fn go_at_open(&self, stat: &mut IntruderStat, said: &mut Vec<String>) -> Fallible<()> {
        let error = self.make_private(PAYLOAD)?;
        stat.private_refused += 1;
        said.push(format!("tried: {error}"));
        for ipa in UNSHARED {
            self.touch_open(ipa)?;
            self.memfd.read(layout::offset(ipa)?, &mut [0])?;
            stat.open_touches += 1;
        }
        said.push(
            "SIGBUS and refused reads do not apply: no memory of this guest is private".into(),
        );
        Ok(())
    }

    /// Tries to take away memory that begins a page before what is pinned, where that page is not pinned
    /// along with its unit for some other buffer.
    fn take_pinned(&self, pinned: PgoffRange) -> Fallible<Error> {
        let before = u64::from(self.unit == PAGE_SIZE);
        let start = Pgoff::new(pinned.start().get().saturating_sub(before));
        let range = PgoffRange::new(start, pinned.end().get() - start.get())?;
        let before: Vec<_> = self.memfd.visibility(range)?.collect();
        let outcome = match self.kind {
            VmKind::Protected => self.convert_to_private(range),
            VmKind::NonProtected => self.memfd.punch_hole(range).map(drop),
        };
        let after: Vec<_> = self.memfd.visibility(range)?.collect();
        let error = match outcome {
            Ok(()) => return Err(format!("{range} was taken though {pinned} is pinned").into()),
            Err(error) => error,
        };
        let culprit_is_right = error.culprit().is_some_and(|culprit| {
            let by_device = match &culprit.found {
                Found::Pinned { owners, .. } => owners.iter().any(|owner| **owner == *OWNER),
                _ => false,
            };
            by_device && culprit.offset == pinned.start_offset()
        });
        if error.kind() != ErrorKind::Busy || !culprit_is_right {
            return Err(format!("{pinned} is pinned, but the refusal says: {error}").into());
        }
        if before != after {
            return Err(format!("what was refused has changed {range}").into());
        }
        Ok(error)
    }

    fn convert_to_private(&self, range: PgoffRange) -> Result<(), Error> {
        self.memfd.convert(range, Visibility::Private, ContentPolicy::Preserve).map(drop)
    }

    /// Tries to give a guest memory of its own that cannot have any.
    fn make_private(&self, at: u64) -> Fallible<Error> {
        let range = Attempt::on(at, 1).pages(self.unit).ok_or("there is no guest memory")?;
        match self.convert_to_private(range) {
            Ok(()) => Err(format!("{range} is private to a guest that is not protected").into()),
            Err(error) if error.kind() == ErrorKind::HypervisorRefused => Ok(error),
            Err(error) => Err(error.into()),
        }
    }

    fn touch_open(&self, ipa: u64) -> Fallible<()> {
        match self.view.touch(self.sigbus, layout::offset(ipa)?, Access::Read)? {
            Touch::Byte(_) => Ok(()),
            Touch::Fault(fault) => Err(format!("shared memory faulted: {fault:?}").into()),
        }
    }

    fn touch_private(&self, at: Offset, access: Access) -> Fallible<Hva> {
        let expected = self.view.hva_of(at).ok_or("no such address in the view")?;
        match self.view.touch(self.sigbus, at, access)? {
            Touch::Fault(fault)
                if fault.hva == expected
                    && fault.offset == at
                    // The other while a folio of the guest's comes there.
                    && [FaultCause::NotMapped, FaultCause::Inaccessible].contains(&fault.cause) =>
            {
                Ok(fault.hva)
            }
            Touch::Fault(fault) => {
                Err(format!("expected a SIGBUS at {expected}: {fault:?}").into())
            }
            Touch::Byte(_) => Err(format!("the host could touch private memory at {at}").into()),
        }
    }

    fn read_private(&self, at: Offset) -> Fallible<Error> {
        let mut byte = [0];
        match self.memfd.read(at, &mut byte) {
            Ok(()) => Err(format!("the host could read private memory at {at}").into()),
            Err(error) if error.kind() == ErrorKind::NotShared => Ok(error),
            Err(error) => Err(error.into()),
        }
    }
}
