//! Looks whether everything is as the model says.

use super::frames::{Part, Use};
use super::mistake::PoolMistake;
use super::model::Verdict;
use super::object::Charges;
use super::run::{Runner, seen};
use crate::addr::ByteSize;
use crate::geometry::PAGE_BYTES;
use crate::gmem::GuestMemfd;

impl Runner {
    /// Compares the counters, and where everything is.
    pub(super) fn look(&mut self) -> Verdict {
        for (object, model) in self.objects.iter().zip(&self.model.objects) {
            let found = seen(object);
            if found != model.folios {
                return Err(format!(
                    "folios of object {}: {:x?} should be {:x?}",
                    model.nr, found, model.folios
                ));
            }
        }
        self.compare_counters()?;
        for (at, (account, model)) in self.accounts.iter().zip(&mut self.model.accounts).enumerate()
        {
            let stat = account.stat();
            let [charged, peak, used] =
                [stat.charged, stat.peak, stat.used].map(ByteSize::whole_pages);
            // What was undone may have been the most.
            let most = self.model.most_peak.remove(&at).unwrap_or(0);
            if (model.peak..=most).contains(&peak) {
                model.peak = peak;
            }
            let is = Charges { limit: model.limit, charged, peak, used };
            if self.model.mistake == Some(PoolMistake::PeakIsNow) {
                model.peak = model.charged;
            }
            if is != *model {
                return Err(format!("account {at}: {is:?} should be {model:?}"));
            }
        }
        Ok(())
    }

    fn compare_counters(&self) -> Verdict {
        let stat = self.pool.counted();
        let parts = &self.model.parts;
        let (mut free, mut reserved, mut over) = (0, 0, 0);
        for part in parts {
            let of_part = part.count(|it| it == Use::Free);
            let promised = part.promised.pages().min(of_part);
            let promised =
                if self.model.makes(PoolMistake::ForgetsPromises) { 0 } else { promised };
            free += of_part - promised;
            reserved += promised;
            over += part.free().missing(part.promised);
        }
        let failed = |part: &Part| part.frames.iter().filter(|it| it.has_failed).count() as u64;
        let quarantined = |part: &Part| part.count(|it| it == Use::Quarantined);
        let wanted = [
            parts.iter().map(Part::nr_pages).sum(),
            free,
            reserved,
            self.model.nr_used(),
            parts.iter().map(quarantined).sum(),
            parts.iter().map(failed).sum(),
        ];
        let found =
            [stat.capacity, stat.free, stat.reserved, stat.used, stat.quarantined, stat.poisoned]
                .map(ByteSize::whole_pages);
        if found != wanted {
            return Err(format!(
                "capacity, free, reserved, used, quarantined and poisoned: {found:?} should be {wanted:?}"
            ));
        }
        let [capacity, rest @ ..] = found;
        if capacity != rest.iter().sum::<u64>() {
            return Err(format!("the counters do not add up: {found:?}"));
        }
        if stat.over_promised.whole_pages() != over {
            return Err(format!("{:?} should be over-promised by {over}", stat.over_promised));
        }
        let dirty = stat.dirty.whole_pages();
        if dirty > self.model.most_dirty.min(free + reserved) {
            return Err(format!("{dirty} pages are dirty, at most {}", self.model.most_dirty));
        }
        let largest = parts.iter().map(Part::largest_free).max().unwrap_or(0);
        if dirty == 0 && stat.largest_free.whole_pages() != largest {
            return Err(format!("largest free: {:?} should be {largest}", stat.largest_free));
        }
        Ok(())
    }

    /// Compares every byte, and reads every free frame.
    pub(super) fn look_at_bytes(&self) -> Verdict {
        for (object, model) in self.objects.iter().zip(&self.model.objects) {
            for (page, bytes) in object.bytes_behind() {
                let wanted = model.page(page.get()).ok_or("no such page in the model")?;
                if wanted.is_hole || *bytes != [wanted.byte; PAGE_BYTES] {
                    return Err(format!("object {} page {page}: wanted is {wanted:?}", model.nr));
                }
            }
        }
        let objects: Vec<&GuestMemfd> = self.objects.iter().collect();
        (self.inspect)(&self.pool, &objects)
    }

    /// Everything goes, and what is out of use alone is missing then.
    pub(super) fn take_down(&mut self) -> Verdict {
        self.look_at_bytes()?;
        while !self.objects.is_empty() {
            self.drop_object(0)?;
            self.look()?;
        }
        self.scrub()?;
        self.look()?;
        let stat = self.pool.counted();
        let out = stat.quarantined.get() + stat.poisoned.get();
        if stat.free.get() + out != stat.capacity.get() {
            return Err(format!("not all is back: {stat:?}"));
        }
        if self.accounts.iter().any(|it| it.stat().charged.get() + it.stat().used.get() > 0) {
            return Err(String::from("an account is charged for nothing"));
        }
        // Reads every free frame.
        match self.pool.verify_scrubbed() {
            Ok(clean) if clean == stat.free => Ok(()),
            other => Err(format!("clean memory: {other:?} should be {:?}", stat.free)),
        }
    }
}
