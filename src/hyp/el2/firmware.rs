//! A firmware for protected guests: the boot loader leaves it in memory that the host never sees, and EL2 copies it
//! into the pages that a guest is given where the host said that its firmware is to be. Android's only.

use super::host_mmu::{HostMmu, Owner};
use super::spec::SpecPage;
use super::{El2, GuestPage, Pages, State};
use crate::addr::{Gfn, Ipa, Pfn};
use crate::error::Errno;
use crate::stage2::Level;

/// Pages of the firmware, and where they go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    from: Pages,
    to: Pfn,
}

impl Load {
    fn pages(self) -> Pages {
        Pages::new(self.to, self.from.nr())
    }
}

#[cfg_attr(
    not(any(test, feature = "oracle")),
    expect(dead_code, reason = "hosts of pools have no firmware for guests")
)]
impl El2 {
    /// Sets memory aside for the firmware that is in it.
    ///
    /// # Errors
    /// `ENOSYS` in profiles that have none; as for donations to EL2; `EBUSY` the second time.
    pub(crate) fn keep_firmware(&mut self, frames: Pages) -> Result<(), Errno> {
        if !self.profile.is_android() {
            return Err(Errno::ENOSYS);
        }
        let mut host = self.host.lock();
        let mut hyp = self.hyp.lock();
        if host.firmware.nr() > 0 {
            return Err(Errno::EBUSY);
        }
        host.check_state(frames, State::Owned)?;
        host.give(frames, Owner::Hyp, Level::PAGE)?;
        host.pages.set_hyp(frames, State::Owned);
        hyp.map(frames);
        frames.iter().for_each(|pfn| host.spec.step(pfn, SpecPage::Hyp));
        host.firmware = frames;
        Ok(())
    }

    /// Before the machine is reset: nobody finds the firmware afterwards.
    ///
    /// # Errors
    /// `EIO` if some of the memory is broken. The rest is wiped.
    pub(crate) fn wipe_firmware(&self) -> Result<(), Errno> {
        let host = self.host.lock();
        host.firmware.iter().map(|pfn| self.machine.zero(pfn)).fold(Ok(()), Result::and)
    }
}

impl HostMmu {
    /// What of the firmware goes into frames that a guest is about to be given.
    ///
    /// # Errors
    /// `EINVAL` if the firmware does not begin with a page.
    pub(crate) fn firmware_for(
        &self,
        at: Option<Ipa>,
        gfn: Gfn,
        pages: Pages,
    ) -> Result<Option<Load>, Errno> {
        let Some(at) = at.filter(|_| self.firmware.nr() > 0) else { return Ok(None) };
        let (first, start) = (at.gfn().get(), gfn.get());
        let end = first.saturating_add(self.firmware.nr()).min(start + pages.nr());
        let from = first.max(start);
        if from >= end {
            return Ok(None);
        }
        if !at.is_page_aligned() {
            return Err(Errno::EINVAL);
        }
        let source = self.firmware.start().checked_add(from - first).ok_or(Errno::EINVAL)?;
        let to = pages.start().checked_add(from - start).ok_or(Errno::EINVAL)?;
        Ok(Some(Load { from: Pages::new(source, end - from), to }))
    }

    /// Copies it, once the host cannot reach the frames any more.
    ///
    /// # Errors
    /// `EIO` if the memory is broken: then the pages are to be [taken back](Self::ungive).
    pub(crate) fn load(&self, load: Option<Load>) -> Result<(), Errno> {
        let Some(load) = load else { return Ok(()) };
        let mut page = [0; 4096];
        load.from.iter().zip(load.pages().iter()).try_for_each(|(from, to)| {
            self.machine().read(from.pa(), &mut page)?;
            self.machine().write(to.pa(), &page)
        })
    }

    /// Pages that a guest was to have are the host's again, without what may have been loaded into them. One that is broken
    /// stays the guest's by name, and is nobody's.
    pub(crate) fn ungive(&mut self, to: GuestPage, pages: Pages, load: Option<Load>) {
        let Some(load) = load else {
            // Where they were taken from, entries have room.
            if self.take_back(pages, State::Owned).is_ok() {
                return;
            }
            return self.keep(to, pages);
        };
        for (pfn, nth) in pages.iter().zip(0..) {
            let is_clear = !load.pages().contains(pfn) || self.machine().zero(pfn).is_ok();
            if !is_clear || self.take_page_back(pfn, State::Owned).is_err() {
                self.keep(to.after(nth), Pages::one(pfn));
            }
        }
    }

    fn keep(&mut self, to: GuestPage, pages: Pages) {
        self.pages.orphan(pages);
        for (pfn, nth) in pages.iter().zip(0..) {
            self.spec.step(pfn, SpecPage::Guest(to.after(nth)));
        }
    }
}
