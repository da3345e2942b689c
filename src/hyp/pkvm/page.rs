//! What EL2 knows of each frame from the host's side, and of a guest's frames from its side.
//!
//! The host's record is the last level of the host's own stage-2 table: an identity map in which a
//! zero entry means "the host's, as ever". A frame that was given away has an annotation instead,
//! which says to whom; a frame that a guest lets the host see has a leaf again.

use crate::addr::{Gfn, Pfn};
use crate::error::Errno;
use crate::stage2::{
    Annotation, Entry, GuestRun, Leaf, Level, PageState, Prot, Table, TableError, TableShape,
};

/// Which virtual machine, in 16 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct VmHandle(pub(super) u16);

/// Who has a frame that the host has not: the guest, and where it sees the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct GuestOwner {
    pub(super) handle: VmHandle,
    pub(super) gfn: Gfn,
}

// The annotation's payload: bits 3:1 the kind of owner, then 16 bits of handle, 40 of guest frame.
const OWNER_SHIFT: u32 = 1;
const OWNER_BITS: u64 = 0b111;
const OWNER_GUEST: u64 = 2;
const HANDLE_SHIFT: u32 = 4;
const GFN_SHIFT: u32 = HANDLE_SHIFT + u16::BITS;

const _: () = assert!(TableShape::IPA_40.gfn_limit().get() <= 1 << (60 - GFN_SHIFT));

impl GuestOwner {
    const fn to_payload(self) -> u64 {
        self.gfn.get() << GFN_SHIFT
            | (self.handle.0 as u64) << HANDLE_SHIFT
            | OWNER_GUEST << OWNER_SHIFT
    }

    fn from_payload(payload: u64) -> Option<Self> {
        let handle = u16::try_from(payload >> HANDLE_SHIFT & u64::from(u16::MAX)).ok()?;
        (payload >> OWNER_SHIFT & OWNER_BITS == OWNER_GUEST)
            .then(|| Self { handle: VmHandle(handle), gfn: Gfn::new(payload >> GFN_SHIFT) })
    }
}

/// A frame as the host has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostPage {
    /// pKVM's `OWNED`: the host's alone.
    Owned,
    /// pKVM's `SHARED_BORROWED`: a guest's, which lets the host see it.
    SharedBorrowed,
    /// pKVM's `NOPAGE`: a guest's alone.
    NoPage(GuestOwner),
    /// Not memory, or an entry that no transition writes: nothing may be done with it.
    Unusable,
}

/// The host's frames. Frame and host address are the same number, so the table is asked by frame.
#[derive(Debug)]
pub(super) struct HostPages {
    pub(super) table: Table,
    #[cfg(debug_assertions)]
    pub(super) spec: super::spec::Spec,
    nr_frames: u64,
}

const fn identity(pfn: Pfn) -> Gfn {
    Gfn::new(pfn.get())
}

impl HostPages {
    pub(super) fn new(nr_frames: u64) -> Result<Self, TableError> {
        Self::with_limit(nr_frames, usize::MAX)
    }

    pub(super) fn with_limit(nr_frames: u64, nr_tables: usize) -> Result<Self, TableError> {
        let table = Table::with_limit(TableShape::IPA_48, nr_tables)?;
        if nr_frames > table.shape().gfn_limit().get() {
            return Err(TableError::BeyondIpa);
        }
        Ok(Self {
            table,
            #[cfg(debug_assertions)]
            spec: super::spec::Spec::default(),
            nr_frames,
        })
    }

    /// Whether the machine has these frames: `EPERM` if none of them is memory, `EINVAL` if some are.
    pub(super) fn check_memory(&self, pfn: Pfn, nr_pages: u64) -> Result<(), Errno> {
        let end = pfn.get().checked_add(nr_pages).ok_or(Errno::EINVAL)?;
        match (pfn.get() < self.nr_frames, end <= self.nr_frames) {
            (true, true) => Ok(()),
            (true, false) => Err(Errno::EINVAL),
            (false, _) => Err(Errno::EPERM),
        }
    }

    pub(super) fn state(&self, pfn: Pfn) -> HostPage {
        if pfn.get() >= self.nr_frames {
            return HostPage::Unusable;
        }
        match self.table.lookup(identity(pfn)) {
            Ok((_, entry)) => Self::decode(pfn, entry),
            Err(_) => HostPage::Unusable,
        }
    }

    fn decode(pfn: Pfn, entry: Entry) -> HostPage {
        match entry {
            Entry::Empty => HostPage::Owned,
            Entry::Leaf(leaf) if leaf == borrowed(pfn) => HostPage::SharedBorrowed,
            Entry::Annotated(Annotation::HostDonation, payload) => {
                GuestOwner::from_payload(payload).map_or(HostPage::Unusable, HostPage::NoPage)
            }
            _ => HostPage::Unusable,
        }
    }

    /// Every frame that is not simply the host's.
    pub(super) fn taken(&self) -> impl Iterator<Item = (Pfn, HostPage)> {
        self.table.entries().map(|(at, _, entry)| {
            let pfn = Pfn::new(at.get());
            (pfn, Self::decode(pfn, entry))
        })
    }

    /// Memory for the annotations of these runs.
    pub(super) fn reserve(&mut self, runs: &[GuestRun]) -> Result<(), TableError> {
        self.table.reserve(runs.iter().map(|run| (identity(run.pfn), run.nr_pages)))
    }

    pub(super) fn set_owned(&mut self, pfn: Pfn) -> Result<(), TableError> {
        match self.table.clear(identity(pfn), Level::PAGE) {
            Ok(_) | Err(TableError::Absent) => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub(super) fn set_borrowed(&mut self, pfn: Pfn) -> Result<(), TableError> {
        self.table.map(identity(pfn), Level::PAGE, borrowed(pfn))
    }

    pub(super) fn set_donated(&mut self, pfn: Pfn, to: GuestOwner) -> Result<(), TableError> {
        self.table.annotate(identity(pfn), Annotation::HostDonation, to.to_payload())
    }
}

const fn borrowed(pfn: Pfn) -> Leaf {
    Leaf { pfn, prot: Prot::RWX, state: PageState::SharedBorrowed }
}

/// How far a virtual machine has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    Alive,
    /// Its pages are being taken back; nothing is given to it any more.
    Dying,
    /// All of them are back.
    Gone,
}

/// A protected guest's side: its stage-2 table.
#[derive(Debug)]
pub(super) struct GuestPages {
    pub(super) handle: VmHandle,
    pub(super) table: Table,
    pub(super) life: Life,
}

impl GuestPages {
    pub(super) fn owner_of(&self, gfn: Gfn) -> GuestOwner {
        GuestOwner { handle: self.handle, gfn }
    }

    /// Maps the page at `gfn`, or maps it anew in another state.
    pub(super) fn set(&mut self, gfn: Gfn, pfn: Pfn, state: PageState) -> Result<(), TableError> {
        self.table.map(gfn, Level::PAGE, Leaf { pfn, prot: Prot::RWX, state })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_survives_its_annotation() {
        for handle in [0, 1, u16::MAX] {
            for gfn in [0, 1, TableShape::IPA_40.gfn_limit().get() - 1] {
                let owner = GuestOwner { handle: VmHandle(handle), gfn: Gfn::new(gfn) };
                assert_eq!(GuestOwner::from_payload(owner.to_payload()), Some(owner));
            }
        }
        assert_eq!(GuestOwner::from_payload(0), None);
    }

    #[test]
    fn a_frame_is_the_hosts_until_said_otherwise() {
        let mut host = HostPages::new(8).unwrap();
        let pfn = Pfn::new(3);
        let owner = GuestOwner { handle: VmHandle(7), gfn: Gfn::new(0x40) };
        assert_eq!(host.state(pfn), HostPage::Owned);
        host.set_donated(pfn, owner).unwrap();
        assert_eq!(host.state(pfn), HostPage::NoPage(owner));
        host.set_borrowed(pfn).unwrap();
        assert_eq!(host.state(pfn), HostPage::SharedBorrowed);
        assert_eq!(host.taken().collect::<Vec<_>>(), [(pfn, HostPage::SharedBorrowed)]);
        host.set_owned(pfn).unwrap();
        host.set_owned(pfn).unwrap();
        assert_eq!(host.state(pfn), HostPage::Owned);
        assert_eq!(host.table.nr_tables(), 1);
    }

    #[test]
    fn what_is_no_memory_is_unusable() {
        let host = HostPages::new(8).unwrap();
        for pfn in [8, 9, 1 << 36, u64::MAX] {
            assert_eq!(host.state(Pfn::new(pfn)), HostPage::Unusable);
            let expected = if pfn == u64::MAX { Errno::EINVAL } else { Errno::EPERM };
            assert_eq!(host.check_memory(Pfn::new(pfn), 1), Err(expected));
        }
        assert_eq!(host.check_memory(Pfn::new(7), 1), Ok(()));
        assert_eq!(host.check_memory(Pfn::new(7), 2), Err(Errno::EINVAL));
        assert_eq!(host.check_memory(Pfn::new(7), u64::MAX), Err(Errno::EINVAL));
        assert!(HostPages::new(u64::MAX).is_err());
    }
}
