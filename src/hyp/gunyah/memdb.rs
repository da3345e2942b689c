//! The memory database: who owns each frame. Exactly one does, or nobody.
//!
//! A radix tree of four levels and 512 entries. An entry is an owner of all that it spans, or leads to a node;
//! a node whose entries are all alike is given up for one entry. So a lookup is at most four loads in a
//! machine of any size, and what is owned in large pieces costs next to nothing.

use super::error::HypError;
use crate::addr::Pfn;
use crate::geometry::index;
use crate::range::PfnRange;

/// An extent's number. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ExtentId(pub(super) u32);

/// Who owns a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Owner {
    /// No memory, or memory that no partition was given.
    Nobody,
    /// The root partition: memory that is in no extent.
    Partition,
    /// The hypervisor's own heap, of which tables are made.
    Allocator,
    /// The hypervisor's trace buffer.
    Trace,
    Extent(ExtentId),
}

const BITS: u32 = 9;
const NODE: usize = 1 << BITS;
const HEIGHT: u32 = 3;
const CHILD: u32 = 1 << 31;
const FIRST_EXTENT: u32 = 4;
/// How many extents may ever be made.
pub(crate) const MOST_EXTENTS: u32 = CHILD - FIRST_EXTENT;

impl Owner {
    const fn code(self) -> u32 {
        match self {
            Self::Nobody => 0,
            Self::Partition => 1,
            Self::Allocator => 2,
            Self::Trace => 3,
            Self::Extent(ExtentId(id)) => FIRST_EXTENT + id,
        }
    }

    const fn from_code(code: u32) -> Self {
        match code {
            0 => Self::Nobody,
            1 => Self::Partition,
            2 => Self::Allocator,
            3 => Self::Trace,
            code => Self::Extent(ExtentId(code - FIRST_EXTENT)),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Memdb {
    nodes: Vec<[u32; NODE]>,
    idle: Vec<u32>,
}

/// A piece of a change: what is asked, and of which node.
#[derive(Clone, Copy)]
struct Span {
    start: u64,
    end: u64,
    code: u32,
}

impl Memdb {
    /// The first frame that no address reaches.
    pub(crate) const LIMIT: Pfn = Pfn::new(1 << (BITS * (HEIGHT + 1)));

    pub(crate) fn new() -> Self {
        Self { nodes: vec![[Owner::Nobody.code(); NODE]], idle: Vec::new() }
    }

    /// Who owns a frame, and the first frame behind it that may be somebody else's.
    fn entry(&self, pfn: u64) -> (u32, u64) {
        if pfn >= Self::LIMIT.get() {
            return (Owner::Nobody.code(), u64::MAX);
        }
        let mut node = 0;
        let mut shift = BITS * HEIGHT;
        loop {
            let entry = self.nodes[node][index(pfn >> shift) & (NODE - 1)];
            if entry & CHILD == 0 {
                return (entry, ((pfn >> shift) + 1) << shift);
            }
            node = (entry & !CHILD) as usize;
            shift -= BITS;
        }
    }

    pub(crate) fn owner(&self, pfn: Pfn) -> Owner {
        Owner::from_code(self.entry(pfn.get()).0)
    }

    /// Whether all of the frames are this owner's.
    pub(crate) fn is_all(&self, frames: PfnRange, owner: Owner) -> bool {
        let mut next = frames.start().get();
        while next < frames.end().get() {
            let (code, end) = self.entry(next);
            if code != owner.code() {
                return false;
            }
            next = end;
        }
        true
    }

    /// The pieces of a range that are this owner's, each as long as it can be.
    pub(crate) fn walk(&self, frames: PfnRange, owner: Owner) -> Vec<PfnRange> {
        let mut found: Vec<PfnRange> = Vec::new();
        let mut next = frames.start().get();
        let mut open = None;
        while next < frames.end().get() {
            let (code, end) = self.entry(next);
            let is_wanted = code == owner.code();
            match (open, is_wanted) {
                (None, true) => open = Some(next),
                (Some(start), false) => {
                    found.extend(PfnRange::new(Pfn::new(start), next - start));
                    open = None;
                }
                _ => {}
            }
            next = end;
        }
        if let Some(start) = open {
            found.extend(PfnRange::new(Pfn::new(start), frames.end().get() - start));
        }
        found
    }

    /// Gives frames that nobody owns.
    ///
    /// # Errors
    /// `NotOwner` if somebody does; nothing has changed.
    pub(crate) fn insert(&mut self, frames: PfnRange, to: Owner) -> Result<(), HypError> {
        self.update(frames, to, Owner::Nobody)
    }

    /// Moves frames from their owner to another.
    ///
    /// # Errors
    /// `NotOwner` if one of them is not `from`'s, or is beyond all addresses; nothing has changed.
    pub(crate) fn update(
        &mut self,
        frames: PfnRange,
        to: Owner,
        from: Owner,
    ) -> Result<(), HypError> {
        if frames.end() > Self::LIMIT || !self.is_all(frames, from) {
            return Err(HypError::NotOwner);
        }
        let span = Span { start: frames.start().get(), end: frames.end().get(), code: to.code() };
        self.set(0, HEIGHT, 0, span);
        Ok(())
    }

    fn set(&mut self, node: usize, height: u32, first: u64, span: Span) {
        let shift = BITS * height;
        let last = (span.end - 1).min(first + ((NODE as u64) << shift) - 1);
        for nth in (span.start.max(first) - first) >> shift..=(last - first) >> shift {
            let (at, start) = (index(nth), first + (nth << shift));
            let entry = self.nodes[node][at];
            if entry == span.code {
                continue;
            }
            if span.start <= start && start + (1 << shift) <= span.end {
                self.free(entry);
                self.nodes[node][at] = span.code;
                continue;
            }
            // Part of what the entry spans, so it has a node: pages are never in part.
            let child = match entry & CHILD {
                0 => CHILD | self.node_of(entry),
                _ => entry,
            };
            let below = (child & !CHILD) as usize;
            self.set(below, height - 1, start, span);
            let only = self.nodes[below][0];
            let is_uniform = only & CHILD == 0 && self.nodes[below].iter().all(|&one| one == only);
            self.nodes[node][at] = child;
            if is_uniform {
                self.free(child);
                self.nodes[node][at] = only;
            }
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "36 bits of frames need fewer nodes than 2^28"
    )]
    fn node_of(&mut self, entry: u32) -> u32 {
        match self.idle.pop() {
            Some(node) => {
                self.nodes[node as usize] = [entry; NODE];
                node
            }
            None => {
                self.nodes.push([entry; NODE]);
                (self.nodes.len() - 1) as u32
            }
        }
    }

    fn free(&mut self, entry: u32) {
        if entry & CHILD == 0 {
            return;
        }
        let node = entry & !CHILD;
        for at in 0..NODE {
            self.free(self.nodes[node as usize][at]);
        }
        self.idle.push(node);
    }

    /// How many nodes are in use.
    #[cfg(test)]
    pub(crate) fn nr_nodes(&self) -> usize {
        self.nodes.len() - self.idle.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(start: u64, nr: u64) -> PfnRange {
        PfnRange::new(Pfn::new(start), nr).unwrap()
    }

    const A: Owner = Owner::Extent(ExtentId(0));
    const B: Owner = Owner::Extent(ExtentId(7));

    #[test]
    fn a_frame_goes_from_its_owner_only() {
        let mut db = Memdb::new();
        db.insert(range(0x1000, 0x1000), Owner::Partition).unwrap();
        assert_eq!(db.insert(range(0x1fff, 2), Owner::Trace), Err(HypError::NotOwner));
        assert_eq!(db.update(range(0x0fff, 2), A, Owner::Partition), Err(HypError::NotOwner));
        assert_eq!(db.owner(Pfn::new(0x0fff)), Owner::Nobody);
        db.update(range(0x1200, 0x300), A, Owner::Partition).unwrap();
        assert_eq!(db.update(range(0x1200, 0x301), B, A), Err(HypError::NotOwner));
        assert_eq!(db.owner(Pfn::new(0x1200)), A, "a refusal changes nothing");
        db.update(range(0x1300, 1), B, A).unwrap();
        assert_eq!(db.walk(range(0, 0x4000), A), [range(0x1200, 0x100), range(0x1301, 0x1ff)]);
        assert_eq!(db.walk(range(0x1250, 0x100), A), [range(0x1250, 0xb0), range(0x1301, 0x4f)]);
        let far = range(Memdb::LIMIT.get() - 1, 2);
        assert_eq!(db.insert(far, A), Err(HypError::NotOwner));
        assert_eq!(db.owner(Pfn::new(u64::MAX)), Owner::Nobody);
    }

    #[test]
    fn what_is_alike_has_no_nodes() {
        const TIB: u64 = 1 << 28;
        let mut db = Memdb::new();
        db.insert(range(0, TIB), Owner::Partition).unwrap();
        // Half of the root's first entry behind it: none.
        assert_eq!(db.nr_nodes(), 1);
        for nth in 0..512 {
            db.update(range(nth * 2, 1), A, Owner::Partition).unwrap();
        }
        assert_eq!(db.nr_nodes(), 1 + 3 + 1, "two leaves, and the way to them");
        for nth in 0..512 {
            db.update(range(nth * 2, 1), Owner::Partition, A).unwrap();
        }
        assert_eq!(db.nr_nodes(), 1);
        assert!(db.is_all(range(0, TIB), Owner::Partition));
        assert_eq!(db.walk(range(5, TIB), Owner::Partition), [range(5, TIB - 5)]);
    }

    #[test]
    fn idle_nodes_are_used_again() {
        let mut db = Memdb::new();
        for _ in 0..100 {
            db.insert(range(0x7_0000_0001, 1), A).unwrap();
            db.update(range(0x7_0000_0001, 1), Owner::Nobody, A).unwrap();
        }
        assert_eq!(db.nodes.len(), 4);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Against a list of frames.
        #[test]
        fn it_is_a_list_of_frames(
            steps in prop::collection::vec((0_u64..1200, 1_u64..700, 0_u32..4, 0_u32..4), 1..60)
        ) {
            const BASE: u64 = (1 << 27) - 600;
            let mut db = Memdb::new();
            let mut list = [Owner::Nobody; 2000];
            let who = |nth| match nth {
                0 => Owner::Nobody,
                1 => Owner::Partition,
                2 => A,
                _ => B,
            };
            for (start, nr, to, from) in steps {
                let part = &mut list[start as usize..(start + nr) as usize];
                let fits = part.iter().all(|&owner| owner == who(from));
                let answer = db.update(range(BASE + start, nr), who(to), who(from));
                prop_assert_eq!(answer.is_ok(), fits);
                if fits {
                    part.fill(who(to));
                } else if from == 0 {
                    // Otherwise hardly anything would ever fit.
                    for pfn in start..start + nr {
                        let old = list[pfn as usize];
                        db.update(range(BASE + pfn, 1), who(to), old).unwrap();
                        list[pfn as usize] = who(to);
                    }
                }
                for (nth, &owner) in list.iter().enumerate() {
                    prop_assert_eq!(db.owner(Pfn::new(BASE + nth as u64)), owner);
                }
                let runs = db.walk(range(BASE, 2000), A);
                let nr_a = list.iter().filter(|&&owner| owner == A).count() as u64;
                prop_assert_eq!(runs.iter().map(|run| run.nr_pages()).sum::<u64>(), nr_a);
                prop_assert!(runs.windows(2).all(|two| two[0].end() < two[1].start()));
            }
        }
    }
}
