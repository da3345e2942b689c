//! What becomes of a guest's page when the host's kernel writes to it by a pointer that it has kept.
//!
//! Both scenes play on a small guest, beside the one that reads the disk. In the first the kernel does as it is used
//! to: it asks nobody. In the second it has a pin of gmem's, and the page stays where it is until the kernel is done.

use std::sync::Arc;

use gmem::addr::{ByteSize, Ipa};
use gmem::error::{Error, ErrorKind, Found};
use gmem::hyp::{Exit, Hypercall, Hypervisor, Model, RawHost, RawOutcome, RawPath, Vcpu};
use gmem::range::PgoffRange;
use gmem::{ContentPolicy, FolioPool, GuestMemfd, PinMode, Visibility};

use crate::Fallible;
use crate::aftermath::Guest;
use crate::console::Console;
use crate::layout::{self, RAM};

/// How much memory the small guest has: a folio.
pub(crate) const RAM_BYTES: u64 = 2 << 20;
/// The page that the guest loses, and the one that it keeps.
const LOST: u64 = RAM;
const KEPT: u64 = RAM + 4096;
/// Where in a page the guest's own words are, and where the kernel writes.
const WORDS_AT: u64 = 512;
const KERNEL_AT: u64 = 0;
const WORDS: &[u8] = b"the guest's own words";
const LATE: &[u8] = b"written by the kernel";
/// The name under which the kernel pins memory, where it does.
const OWNER: &str = "host kernel";

/// What was seen, each as it should be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct HazardStat {
    /// Pages destroyed under the guest, and its exits because of that.
    pub(crate) destroyed: u64,
    pub(crate) poisoned_exits: u64,
    /// Times that the host's kernel would have died.
    pub(crate) fatal: u64,
    /// Reads of private memory by a device.
    pub(crate) dma_into_private: u64,
    /// Touches of private memory that the hypervisor stopped, by user space and by a copy of the kernel's.
    pub(crate) signals: u64,
    pub(crate) efault: u64,
    /// What gmem refused.
    pub(crate) accesses_prevented: u64,
    pub(crate) pins_prevented: u64,
    pub(crate) conversions_prevented: u64,
}

/// The thread that plays both scenes.
#[derive(Debug)]
pub(crate) struct Hazard {
    pub(crate) pool: FolioPool,
    pub(crate) hypervisor: Hypervisor,
    pub(crate) console: Arc<Console>,
}

/// The small guest, and those who reach for its memory.
struct Scene {
    /// Which of the two it is.
    name: &'static str,
    memfd: GuestMemfd,
    vcpu: Vcpu,
    raw: RawHost,
    model: Model,
    console: Arc<Console>,
    stat: HazardStat,
}

impl Hazard {
    /// Plays both scenes, and leaves the guest as it is then for the audit.
    pub(crate) fn play(self) -> Fallible<(HazardStat, Guest)> {
        let size = ByteSize::from_bytes(RAM_BYTES);
        let memfd = GuestMemfd::builder(size).name("small guest").create(&self.pool)?;
        let vm = self.hypervisor.create_vm()?;
        let model = self.hypervisor.model();
        if model.fixes_sides() {
            // Now or never.
            let _ = memfd.convert(page(KEPT)?, Visibility::Shared, ContentPolicy::Preserve)?;
        }
        let for_good = memfd.stat().shared;
        vm.bind(Ipa::new(RAM).gfn(), &memfd, memfd.pages())?;
        let mut scene = Scene {
            name: "hazard",
            memfd: memfd.clone(),
            vcpu: vm.create_vcpu()?,
            raw: self.hypervisor.raw_host(),
            model,
            console: self.console,
            stat: HazardStat::default(),
        };
        scene.without_a_pin()?;
        scene.name = "rescue";
        scene.with_a_pin()?;
        Ok((scene.stat, Guest { vm, memfd, for_good }))
    }
}

impl Scene {
    /// The hazard: a pointer, and no pin.
    fn without_a_pin(&mut self) -> Fallible<()> {
        if self.model.fixes_sides() {
            self.say(
                "a small guest's page was never shared; the host's kernel has a pointer to it",
            );
        } else {
            self.share(LOST)?;
            self.expect_raw(RawPath::KernelAlias, LOST + KERNEL_AT, LATE, RawOutcome::Done)?;
            self.say("a small guest shares a page; the host's kernel writes there by a pointer and keeps that");
            self.ask(Hypercall::MemUnshare(Ipa::new(LOST)))??;
        }
        self.vcpu.store(Ipa::new(LOST + WORDS_AT), WORDS)?;
        self.say("the guest has the page to itself: nothing is pinned, so nothing is in the way");

        self.go_at_private()?;

        let outcome = self.model.answer_to_stray(RawPath::KernelAlias);
        self.expect_raw(RawPath::KernelAlias, LOST + KERNEL_AT, LATE, outcome)?;
        match outcome {
            RawOutcome::Destroyed => self.page_is_destroyed(),
            RawOutcome::Oops => {
                self.stat.fatal += 1;
                self.say("the kernel writes by the pointer it has kept: a real one dies here");
                self.expect_words(LOST + WORDS_AT, WORDS)?;
                self.say("the guest's bytes are whole");
                Ok(())
            }
            other => Err(format!("nobody knows how to go on after {other:?}").into()),
        }
    }

    fn page_is_destroyed(&mut self) -> Fallible<()> {
        self.stat.destroyed += 1;
        self.say("the kernel writes by the pointer it has kept: it is given the page, destroyed");
        match self.vcpu.load(Ipa::new(LOST + WORDS_AT), &mut [0]) {
            Err(exit @ Exit::Poisoned { ipa }) if ipa == Ipa::new(LOST + WORDS_AT) => {
                self.stat.poisoned_exits += 1;
                self.say(&format!("the guest's next load exits: {exit}"));
            }
            other => return Err(format!("a load of a destroyed page: {other:?}").into()),
        }
        // What the guest had there is lost to everybody.
        let mut left = [1; WORDS.len()];
        let at = layout::offset(LOST + WORDS_AT)?;
        let read = self.raw.load(RawPath::User, &self.memfd, at, &mut left)?;
        match (read, left) == (RawOutcome::Done, [0; WORDS.len()]) {
            true => Ok(()),
            false => Err(format!("a destroyed page reads {left:?}: {read:?}").into()),
        }
    }

    /// Everything else that a host may try at a private page, past gmem and through it.
    fn go_at_private(&mut self) -> Fallible<()> {
        let at = layout::offset(LOST + WORDS_AT)?;
        let signal = self.model.answer_to_stray(RawPath::User);
        self.expect_raw(RawPath::User, LOST + WORDS_AT, LATE, signal)?;
        self.stat.signals += 1;
        let refusal = self.model.answer_to_stray(RawPath::Uaccess);
        self.expect_raw(RawPath::Uaccess, LOST + WORDS_AT, LATE, refusal)?;
        self.stat.efault += 1;
        self.expect_words(LOST + WORDS_AT, WORDS)?;
        self.say(&format!(
            "a store by user space gets {signal:?}, a copy by the kernel {refusal:?}; the bytes are whole"
        ));

        let mut seen = [0; WORDS.len()];
        let wanted = self.model.answer_to_stray(RawPath::Dma);
        let dma = self.raw.load(RawPath::Dma, &self.memfd, at, &mut seen)?;
        let reached = dma == RawOutcome::Done;
        if dma != wanted || (seen == WORDS) != reached {
            return Err(format!("DMA from a private page: {dma:?}, {seen:?}").into());
        }
        self.stat.dma_into_private += u64::from(reached);
        self.say(match reached {
            true => "a device reads them: no IOMMU of the hypervisor's stands between",
            false => "a device is stopped by the hypervisor",
        });

        let read = expect_refused(self.memfd.read(at, &mut seen), ErrorKind::NotShared)?;
        self.stat.accesses_prevented += 1;
        let owner = self.memfd.register_owner(OWNER)?;
        let pin = self.memfd.pin(page(LOST)?, owner, PinMode::Counted).map(drop);
        let pin = expect_refused(pin, ErrorKind::NotShared)?;
        self.stat.pins_prevented += 1;
        self.say(&format!("through gmem: {read}"));
        self.say(&format!("through gmem: {pin}"));
        Ok(())
    }

    /// The rescue: the same with a pin.
    fn with_a_pin(&mut self) -> Fallible<()> {
        self.share(KEPT)?;
        self.vcpu.store(Ipa::new(KEPT + WORDS_AT), WORDS)?;
        let memfd = self.memfd.clone();
        let pin = memfd.pin(page(KEPT)?, memfd.register_owner(OWNER)?, PinMode::Counted)?;
        self.say("the guest shares another page; the kernel keeps a pointer to it, and a pin");

        let take_back = Hypercall::MemUnshare(Ipa::new(KEPT));
        let refused = expect_refused(self.ask(take_back)?, ErrorKind::Busy)?;
        if !names_the_owner(&refused, KEPT)? {
            return Err(format!("the refusal does not name page and owner: {refused}").into());
        }
        self.stat.conversions_prevented += 1;
        self.say(&format!("the guest wants it back, and is told no: {refused}"));

        self.expect_raw(RawPath::KernelAlias, KEPT + KERNEL_AT, LATE, RawOutcome::Done)?;
        self.expect_words(KEPT + KERNEL_AT, LATE)?;
        self.expect_words(KEPT + WORDS_AT, WORDS)?;
        self.say("the kernel writes by its pointer; the guest finds that, and its own bytes whole");

        drop(pin);
        if self.model.fixes_sides() {
            let refused = expect_refused(self.ask(take_back)?, ErrorKind::HypervisorRefused)?;
            self.say(&format!(
                "the pin is gone, and the page stays shared all the same: {refused}"
            ));
            return Ok(());
        }
        self.ask(take_back)??;
        self.expect_words(KEPT + WORDS_AT, WORDS)?;
        self.say("the pin is gone, the guest asks again and has the page to itself");
        Ok(())
    }

    fn share(&mut self, at: u64) -> Fallible<()> {
        self.vcpu.store(Ipa::new(at), &[0; 4096])?;
        Ok(self.ask(Hypercall::MemShare(Ipa::new(at)))??)
    }

    /// Asks the VMM for a page, which tries; the guest has to be told what came of that.
    fn ask(&mut self, call: Hypercall) -> Fallible<Result<(), Error>> {
        let converted = match self.vcpu.hvc(call) {
            // It was so from the beginning.
            Ok(told) if told.is_success() && self.model.fixes_sides() => return Ok(Ok(())),
            Err(Exit::Conversion(request)) => request.convert().map(drop),
            other => return Err(format!("{call:x?} does not reach the VMM: {other:?}").into()),
        };
        match self.vcpu.answer()? {
            told if told.is_success() == converted.is_ok() => Ok(converted),
            told => Err(format!("the guest is told {told:x?} of {converted:?}").into()),
        }
    }

    fn expect_raw(&self, by: RawPath, at: u64, data: &[u8], wanted: RawOutcome) -> Fallible<()> {
        match self.raw.store(by, &self.memfd, layout::offset(at)?, data)? {
            outcome if outcome == wanted => Ok(()),
            other => Err(format!("a store by {by:?} at {at:#x}: {other:?}, not {wanted:?}").into()),
        }
    }

    fn expect_words(&mut self, at: u64, words: &[u8]) -> Fallible<()> {
        let mut found = vec![0; words.len()];
        self.vcpu.load(Ipa::new(at), &mut found)?;
        match found == words {
            true => Ok(()),
            false => Err(format!("the guest finds {found:?} at {at:#x}, not {words:?}").into()),
        }
    }

    fn say(&self, what: &str) {
        self.console.say(self.name, what);
    }
}

fn page(ipa: u64) -> Result<PgoffRange, Error> {
    layout::pages_of(layout::frames(ipa, 1)?)
}

fn expect_refused(outcome: Result<(), Error>, wanted: ErrorKind) -> Fallible<Error> {
    match outcome {
        Err(error) if error.kind() == wanted => Ok(error),
        other => Err(format!("expected to be refused as {wanted:?}, not {other:?}").into()),
    }
}

/// Whether a refusal says which page stood in the way, and who has it pinned.
fn names_the_owner(refusal: &Error, at: u64) -> Fallible<bool> {
    let at = layout::offset(at)?;
    Ok(refusal.culprit().is_some_and(|culprit| match &culprit.found {
        Found::Pinned { owners, .. } => {
            culprit.offset == at && owners.iter().any(|owner| **owner == *OWNER)
        }
        _ => false,
    }))
}
