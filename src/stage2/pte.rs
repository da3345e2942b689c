//! One stage-2 descriptor: a word in Arm's layout, and what a hypervisor keeps in the bits Arm leaves free.
//!
//! | bits  | valid page, block           | valid table        | not valid, not zero        |
//! |-------|-----------------------------|--------------------|----------------------------|
//! | 0     | 1                           | 1                  | 0                          |
//! | 1     | 1 page (level 3), 0 block   | 1                  | payload                    |
//! | 5:2   | MemAttr                     | 0                  | payload                    |
//! | 7:6   | S2AP: write, read           | 0                  | payload                    |
//! | 9:8   | shareability                | 0                  | payload                    |
//! | 10    | AF                          | 0                  | payload                    |
//! | 47:12 | output frame                | key of the table   | payload                    |
//! | 54:53 | XN                          | 0                  | payload                    |
//! | 56:55 | page state                  | 0                  | payload                    |
//! | 63:60 | 0                           | 0                  | kind of annotation, not 0  |
//!
//! A zero word is an empty entry. An annotation keeps its table alive just as a leaf does.

use std::fmt;

use super::walk::TableError;
use crate::addr::{Access, Pfn};
use crate::geometry::index;

const VALID: u64 = 1 << 0;
const NOT_BLOCK: u64 = 1 << 1;
/// Normal memory, write-back, inner and outer.
const MEMATTR_NORMAL: u64 = 0xf << 2;
const READ: u64 = 1 << 6;
const WRITE: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 0b11 << 8;
const ACCESSED: u64 = 1 << 10;
const ADDRESS_SHIFT: u32 = 12;
const FRAME_BITS: u32 = 36;
const ADDRESS: u64 = ((1 << FRAME_BITS) - 1) << ADDRESS_SHIFT;
const MEMATTR_DEVICE: u64 = 0b0001 << 2;
const NEVER_EXECUTE: u64 = 0b10 << 53;
/// The kernel may where user space may not, or the other way round.
const LEVELS_DIFFER: u64 = 0b01 << 53;
const XN: u64 = NEVER_EXECUTE | LEVELS_DIFFER;
const STATE_SHIFT: u32 = 55;
const STATE: u64 = 0b11 << STATE_SHIFT;
const KIND_SHIFT: u32 = 60;
const KIND: u64 = 0xf << KIND_SHIFT;
const LOCKED_KIND: u64 = 1;

const _: () = assert!(
    VALID | NOT_BLOCK | MEMATTR_NORMAL | READ | WRITE | INNER_SHAREABLE | ACCESSED | ADDRESS
        == (1 << 48) - 1 - (1 << 11)
);
const _: () = assert!((XN | STATE | KIND) & ADDRESS == 0 && XN & STATE == 0 && STATE & KIND == 0);

/// A level of the walk, counted as Arm does: a leaf at 3 is a page, at 2 and 1 a block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Level(i8);

impl Level {
    pub(crate) const PAGE: Self = Self(3);
    /// 2 MiB, where tables have 512 entries.
    pub(crate) const BLOCK_2M: Self = Self(2);
    /// 1 GiB, where tables have 512 entries.
    pub(crate) const BLOCK_1G: Self = Self(1);

    /// The level `tables` above the pages.
    pub(super) const fn above_pages(tables: u8) -> Self {
        // At most four: a TableShape has five levels at most.
        Self(3_i8.wrapping_sub_unsigned(tables))
    }

    /// How many levels lie between this one and the pages.
    pub(super) const fn height(self) -> u32 {
        Self::PAGE.0.abs_diff(self.0) as u32
    }

    pub(crate) const fn below(self) -> Self {
        Self(self.0 + 1)
    }

    pub(super) const fn above(self) -> Self {
        Self(self.0 - 1)
    }

    /// Whether an entry of this level may be a leaf.
    pub(super) fn has_leaves(self) -> bool {
        (Self::BLOCK_1G..=Self::PAGE).contains(&self)
    }
}

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "L{}", self.0)
    }
}

/// What a guest may do with a page.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Prot(u64);

impl Prot {
    #[cfg(test)]
    pub(crate) const R: Self = Self(READ | NEVER_EXECUTE);
    pub(crate) const RW: Self = Self(READ | WRITE | NEVER_EXECUTE);
    pub(crate) const RWX: Self = Self(READ | WRITE);
    const MASK: u64 = READ | WRITE | XN;

    /// Exactly these rights.
    pub(crate) const fn of(read: bool, write: bool, execute: bool) -> Self {
        let read = if read { READ } else { 0 };
        let write = if write { WRITE } else { 0 };
        Self(read | write | if execute { 0 } else { NEVER_EXECUTE })
    }

    /// The same with the right to execute at each level of privilege, the user's first.
    pub(crate) const fn at_levels(read: bool, write: bool, [user, kernel]: [bool; 2]) -> Self {
        let user_never = if user { 0 } else { NEVER_EXECUTE };
        let differ = if user == kernel { 0 } else { LEVELS_DIFFER };
        Self(Self::of(read, write, true).0 | user_never | differ)
    }

    /// Who may execute: user, kernel.
    pub(crate) const fn executes_at(self) -> [bool; 2] {
        let user = self.0 & NEVER_EXECUTE == 0;
        [user, user == (self.0 & LEVELS_DIFFER == 0)]
    }

    pub(crate) const fn reads(self) -> bool {
        self.0 & READ != 0
    }

    pub(crate) const fn writes(self) -> bool {
        self.0 & WRITE != 0
    }

    /// Whether an access is among them.
    #[inline]
    pub(crate) const fn allows(self, access: Access) -> bool {
        match access {
            Access::Read => self.reads(),
            Access::Write => self.writes(),
        }
    }

    pub(crate) const fn executes(self) -> bool {
        self.0 & XN == 0
    }

    /// These rights, and those.
    pub(crate) const fn and(self, more: Self) -> Self {
        Self::of(
            self.reads() || more.reads(),
            self.writes() || more.writes(),
            self.executes() || more.executes(),
        )
    }

    pub(crate) const fn without_write(self) -> Self {
        Self(self.0 & !WRITE)
    }
}

impl fmt::Debug for Prot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flag = |set: bool, c: &'static str| if set { c } else { "-" };
        f.write_str(flag(self.0 & READ != 0, "r"))?;
        f.write_str(flag(self.0 & WRITE != 0, "w"))?;
        f.write_str(flag(self.0 & XN == 0, "x"))
    }
}

/// Whose page this is, as the owner of the table sees it. The names are those of the kernel's page-table code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum PageState {
    /// Its own, nobody else's.
    Owned,
    /// Its own, and somebody else may see it.
    SharedOwned,
    /// Somebody else's, who lets it see the page.
    SharedBorrowed,
}

impl PageState {
    const fn bits(self) -> u64 {
        match self {
            Self::Owned => 0,
            Self::SharedOwned => 1 << STATE_SHIFT,
            Self::SharedBorrowed => 2 << STATE_SHIFT,
        }
    }

    const fn from_bits(raw: u64) -> Option<Self> {
        match (raw & STATE) >> STATE_SHIFT {
            0 => Some(Self::Owned),
            1 => Some(Self::SharedOwned),
            2 => Some(Self::SharedBorrowed),
            _ => None,
        }
    }
}

/// Where a leaf leads, and with what rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    /// The first frame.
    pub(crate) pfn: Pfn,
    pub(crate) prot: Prot,
    pub(crate) state: PageState,
}

/// Why an entry that leads nowhere is not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Annotation {
    /// In the host's table: the page is somebody else's; the payload says whose.
    HostDonation,
    /// In a guest's table: the page was destroyed, and the guest must never see it zeroed.
    GuestPoisoned,
}

impl Annotation {
    const fn kind(self) -> u64 {
        match self {
            Self::HostDonation => 2,
            Self::GuestPoisoned => 3,
        }
    }
}

/// What a descriptor says, read at its level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    Empty,
    /// In the middle of break-before-make.
    Locked,
    Annotated(Annotation, u64),
    /// The key of the next table.
    Table(usize),
    Leaf(Leaf),
    /// A word that nothing here writes.
    Reserved,
}

/// The descriptor.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pte(u64);

impl Pte {
    pub(crate) const EMPTY: Self = Self(0);
    /// Stands in an entry between break and make.
    pub(crate) const LOCKED: Self = Self(LOCKED_KIND << KIND_SHIFT);

    /// A page, or above [`Level::PAGE`] a block.
    ///
    /// # Errors
    /// [`TableError::Invalid`] at a level without leaves, or for a frame that 48 bits cannot address.
    #[inline(always)]
    pub(crate) fn leaf(level: Level, leaf: Leaf) -> Result<Self, TableError> {
        if !level.has_leaves() || leaf.pfn.get() >> FRAME_BITS != 0 {
            return Err(TableError::Invalid);
        }
        let kind = if level == Level::PAGE { VALID | NOT_BLOCK } else { VALID };
        let attributes = MEMATTR_NORMAL | INNER_SHAREABLE | ACCESSED;
        let frame = leaf.pfn.get() << ADDRESS_SHIFT;
        Ok(Self(kind | attributes | frame | leaf.prot.0 | leaf.state.bits()))
    }

    /// The same for memory that is a device's.
    ///
    /// # Errors
    /// As for [`Self::leaf`].
    pub(crate) fn device(level: Level, leaf: Leaf) -> Result<Self, TableError> {
        Self::leaf(level, leaf).map(|pte| Self(pte.0 & !MEMATTR_NORMAL | MEMATTR_DEVICE))
    }

    /// The way to the next table.
    pub(super) fn table(key: usize) -> Result<Self, TableError> {
        let key = key as u64;
        if key >> FRAME_BITS != 0 {
            return Err(TableError::NoMemory);
        }
        Ok(Self(VALID | NOT_BLOCK | key << ADDRESS_SHIFT))
    }

    /// An entry that leads nowhere and says why.
    ///
    /// # Errors
    /// [`TableError::Invalid`] if the payload needs bit 0 or bits 63:60.
    #[inline(always)]
    pub(crate) fn annotation(kind: Annotation, payload: u64) -> Result<Self, TableError> {
        if payload & (VALID | KIND) != 0 {
            return Err(TableError::Invalid);
        }
        Ok(Self(kind.kind() << KIND_SHIFT | payload))
    }

    pub(crate) const fn is_valid(self) -> bool {
        self.0 & VALID != 0
    }

    pub(crate) const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The key of the table that this entry of a table of `level` leads to.
    #[inline]
    pub(super) fn next_table(self, level: Level) -> Option<usize> {
        let leads = self.0 & (VALID | NOT_BLOCK) == VALID | NOT_BLOCK && level != Level::PAGE;
        leads.then(|| index((self.0 & ADDRESS) >> ADDRESS_SHIFT))
    }

    /// Whether the leaf was used since it was last made old.
    pub(crate) const fn is_young(self) -> bool {
        self.0 & ACCESSED != 0
    }

    /// The leaf as used, or as not.
    pub(crate) const fn aged(self, young: bool) -> Self {
        Self(if young { self.0 | ACCESSED } else { self.0 & !ACCESSED })
    }

    /// The leaf with these rights.
    pub(crate) const fn with_prot(self, prot: Prot) -> Self {
        Self(self.0 & !Prot::MASK | prot.0)
    }

    /// What this leaf says of its memory, at a lower level and for another frame.
    pub(super) const fn part(self, level: Level, pfn: Pfn) -> Self {
        let kind = if level.0 == Level::PAGE.0 { NOT_BLOCK } else { 0 };
        Self(self.0 & !(ADDRESS | NOT_BLOCK) | kind | pfn.get() << ADDRESS_SHIFT & ADDRESS)
    }

    /// Whether two leaves of any level say the same of their memory.
    pub(crate) const fn is_like(self, other: Self) -> bool {
        (self.0 ^ other.0) & !(ADDRESS | NOT_BLOCK) == 0
    }

    /// Whether `new` differs from this valid leaf in more than permissions.
    pub(super) const fn needs_update(self, new: Self) -> bool {
        (self.0 ^ new.0) & !Prot::MASK != 0
    }

    /// What it says in a table of `level`. Total: every word means something at every level.
    #[inline(always)]
    pub(crate) fn decode(self, level: Level) -> Entry {
        if self.is_empty() {
            return Entry::Empty;
        }
        if !self.is_valid() {
            let payload = self.0 & !KIND;
            return match self.0 >> KIND_SHIFT {
                LOCKED_KIND => Entry::Locked,
                2 => Entry::Annotated(Annotation::HostDonation, payload),
                3 => Entry::Annotated(Annotation::GuestPoisoned, payload),
                _ => Entry::Reserved,
            };
        }
        let frame = (self.0 & ADDRESS) >> ADDRESS_SHIFT;
        let is_page = level == Level::PAGE;
        match (self.0 & NOT_BLOCK != 0, is_page) {
            (true, false) => Entry::Table(index(frame)),
            (true, true) => self.decode_leaf(frame),
            (false, false) if level.has_leaves() => self.decode_leaf(frame),
            (false, _) => Entry::Reserved,
        }
    }

    #[inline(always)]
    fn decode_leaf(self, frame: u64) -> Entry {
        match PageState::from_bits(self.0) {
            Some(state) => {
                Entry::Leaf(Leaf { pfn: Pfn::new(frame), prot: Prot(self.0 & Prot::MASK), state })
            }
            None => Entry::Reserved,
        }
    }
}

/// In words. A table is told from a page by its memory attributes, which every leaf has.
impl fmt::Debug for Pte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_table = self.0 & (NOT_BLOCK | MEMATTR_NORMAL) == NOT_BLOCK;
        let level = match self.0 & NOT_BLOCK {
            0 => Level::BLOCK_2M,
            _ if is_table => Level::BLOCK_2M,
            _ => Level::PAGE,
        };
        match self.decode(level) {
            Entry::Empty => f.write_str("empty"),
            Entry::Locked => f.write_str("locked"),
            Entry::Annotated(kind, payload) => write!(f, "{kind:?}({payload:#x})"),
            Entry::Table(key) => write!(f, "table {key}"),
            Entry::Leaf(Leaf { pfn, prot, state }) => {
                let what = if level == Level::PAGE { "page" } else { "block" };
                write!(f, "{what} {pfn} {prot:?} {state:?}")
            }
            Entry::Reserved => write!(f, "reserved {:#x}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEVELS: [Level; 5] = [Level(-1), Level(0), Level::BLOCK_1G, Level::BLOCK_2M, Level::PAGE];

    fn leaf(pfn: u64, state: PageState) -> Leaf {
        Leaf { pfn: Pfn::new(pfn), prot: Prot::RWX, state }
    }

    #[test]
    fn each_level_executes_or_not() {
        for (levels, bits) in [
            ([true, true], 0b00_u64),
            ([true, false], 0b01),
            ([false, false], 0b10),
            ([false, true], 0b11),
        ] {
            let prot = Prot::at_levels(true, false, levels);
            assert_eq!((prot.0 >> 53, prot.executes_at()), (bits, levels));
            assert_eq!((prot.executes(), prot.reads(), prot.writes()), (bits == 0, true, false));
        }
        assert_eq!([Prot::RWX, Prot::RW].map(Prot::executes_at), [[true; 2], [false; 2]]);
    }

    #[test]
    fn the_bits_are_where_arm_has_them() {
        let page = Pte::leaf(Level::PAGE, leaf(0x12345, PageState::Owned)).unwrap();
        assert_eq!(page.0, 0x1234_57ff, "RWX, normal memory, inner shareable, accessed, page");
        let shared = Pte::leaf(Level::PAGE, leaf(0x12345, PageState::SharedOwned)).unwrap();
        assert_eq!(page.0 ^ shared.0, 1 << 55);
        let borrowed = Pte::leaf(Level::PAGE, leaf(0x12345, PageState::SharedBorrowed)).unwrap();
        assert_eq!(page.0 ^ borrowed.0, 1 << 56);
        let block = Pte::leaf(Level::BLOCK_2M, leaf(0x12345, PageState::Owned)).unwrap();
        assert_eq!(page.0 ^ block.0, 1 << 1);
        let read_only = Leaf { prot: Prot::R, ..leaf(0x12345, PageState::Owned) };
        let read_only = Pte::leaf(Level::PAGE, read_only).unwrap();
        assert_eq!(page.0 ^ read_only.0, 1 << 7 | 1 << 54);
        assert_eq!(Pte::LOCKED.0, 1 << 60);
    }

    #[test]
    fn what_goes_in_comes_out() {
        for state in [PageState::Owned, PageState::SharedOwned, PageState::SharedBorrowed] {
            for prot in [Prot::R, Prot::RW, Prot::RWX] {
                for pfn in [0, 1, (1 << FRAME_BITS) - 1] {
                    for level in [Level::BLOCK_1G, Level::BLOCK_2M, Level::PAGE] {
                        let leaf = Leaf { pfn: Pfn::new(pfn), prot, state };
                        let pte = Pte::leaf(level, leaf).unwrap();
                        assert_eq!(pte.decode(level), Entry::Leaf(leaf));
                    }
                }
            }
        }
        for kind in [Annotation::HostDonation, Annotation::GuestPoisoned] {
            let pte = Pte::annotation(kind, 0xfff_ffff_ffff_fffe).unwrap();
            for level in LEVELS {
                assert_eq!(pte.decode(level), Entry::Annotated(kind, 0xfff_ffff_ffff_fffe));
            }
        }
        assert_eq!(Pte::table(77).unwrap().decode(Level::BLOCK_2M), Entry::Table(77));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let far = leaf(1 << FRAME_BITS, PageState::Owned);
        assert_eq!(Pte::leaf(Level::PAGE, far), Err(TableError::Invalid));
        let near = leaf(0, PageState::Owned);
        assert_eq!(Pte::leaf(Level(0), near), Err(TableError::Invalid));
        for payload in [1, 1 << 60, u64::MAX] {
            let got = Pte::annotation(Annotation::HostDonation, payload);
            assert_eq!(got, Err(TableError::Invalid));
        }
        assert_eq!(Pte::table(1 << FRAME_BITS), Err(TableError::NoMemory));
    }

    #[test]
    fn every_word_decodes_at_every_level() {
        let mut words = vec![0, u64::MAX];
        words.extend((0..64).map(|bit| 1_u64 << bit));
        words.extend((0..64).map(|bit| u64::MAX ^ (1 << bit)));
        words.extend((0..64).map(|bit| 1 | 1_u64 << bit));
        for word in words {
            for level in LEVELS {
                let entry = Pte(word).decode(level);
                assert_eq!(entry == Entry::Empty, word == 0);
                assert!(!matches!(entry, Entry::Leaf(_) | Entry::Table(_)) || word & 1 == 1);
                assert!(!(level == Level::PAGE && matches!(entry, Entry::Table(_))));
            }
            assert!(!format!("{:?}", Pte(word)).is_empty());
        }
    }

    #[test]
    fn debug_speaks_words() {
        let page = Pte::leaf(Level::PAGE, leaf(0x12, PageState::SharedOwned)).unwrap();
        assert_eq!(format!("{page:?}"), "page 0x12 rwx SharedOwned");
        let block = Pte::leaf(Level::BLOCK_2M, leaf(0x200, PageState::Owned)).unwrap();
        assert_eq!(format!("{block:?}"), "block 0x200 rwx Owned");
        assert_eq!(format!("{:?}", Pte::table(3).unwrap()), "table 3");
        assert_eq!(format!("{:?} {:?}", Pte::LOCKED, Pte::EMPTY), "locked empty");
        let donated = Pte::annotation(Annotation::HostDonation, 0x40).unwrap();
        assert_eq!(format!("{donated:?}"), "HostDonation(0x40)");
    }
}
