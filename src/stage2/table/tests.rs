use std::collections::BTreeMap;

use super::*;
use crate::addr::Pfn;
use crate::stage2::{Annotation, PageState, Prot};

/// What only tests ask of a table.
impl Table {
    /// How many tables are in use, the root included.
    fn nr_tables(&self) -> usize {
        self.nodes.len()
    }

    /// The frame behind a guest frame, be it mapped by a page or by a block.
    fn translate(&self, gfn: Gfn) -> Option<Pfn> {
        match self.lookup(gfn) {
            Ok((level, Entry::Leaf(leaf))) => {
                leaf.pfn.checked_add(gfn.get() & (self.shape.pages_at(level) - 1))
            }
            _ => None,
        }
    }

    /// The leaf of a single page: what most transitions begin with.
    ///
    /// # Errors
    /// [`TableError::Absent`], else [`TableError::Block`].
    fn page(&self, gfn: Gfn) -> Result<Leaf, TableError> {
        match self.lookup(gfn)? {
            (Level::PAGE, Entry::Leaf(leaf)) => Ok(leaf),
            (_, Entry::Leaf(_)) => Err(TableError::Block),
            _ => Err(TableError::Absent),
        }
    }

    /// Makes the page of `gfn` lead nowhere, and says why. Replaces a leaf.
    ///
    /// # Errors
    /// [`TableError::Invalid`] for a payload that needs bit 0 or bits 63:60,
    /// [`TableError::BeyondIpa`], [`TableError::Block`], [`TableError::Unchanged`],
    /// [`TableError::NoMemory`].
    fn annotate(&mut self, gfn: Gfn, kind: Annotation, payload: u64) -> Result<(), TableError> {
        self.put(gfn, Level::PAGE, Pte::annotation(kind, payload)?)
    }

    /// What is wrong with the tree itself: counts, strays, entries left in the middle of a change.
    fn check(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut nr_reached = 0;
        let mut todo = vec![(self.root, self.shape.root())];
        while let Some((key, level)) = todo.pop() {
            let Some(node) = self.nodes.get(key) else {
                wrong.push(format!("{level:?} table {key} is reachable and gone"));
                continue;
            };
            nr_reached += 1;
            let nr_used = node.entries.iter().filter(|pte| !pte.is_empty()).count();
            if nr_used != node.nr_used || nr_used == 0 && key != self.root {
                wrong.push(format!(
                    "{level:?} table {key} counts {} entries and has {nr_used}",
                    node.nr_used
                ));
            }
            for pte in &node.entries {
                match pte.decode(level) {
                    Entry::Table(next) => todo.push((next, level.below())),
                    Entry::Locked | Entry::Reserved => {
                        wrong.push(format!("{level:?} table {key} has an entry {pte:?}"));
                    }
                    _ => {}
                }
            }
            if nr_reached > self.nodes.len() {
                wrong.push("a table is reachable twice".into());
                return wrong;
            }
        }
        if nr_reached != self.nodes.len() {
            wrong.push(format!("{} of {} tables are reachable", nr_reached, self.nodes.len()));
        }
        wrong
    }
}

/// Three levels of four entries: 64 pages, blocks of 4 pages and of 16.
fn tiny() -> Table {
    Table::new(TableShape::new(3, 2, 2).unwrap()).unwrap()
}

fn leaf(pfn: u64, state: PageState) -> Leaf {
    Leaf { pfn: Pfn::new(pfn), prot: Prot::RWX, state }
}

fn owned(pfn: u64) -> Leaf {
    leaf(pfn, PageState::Owned)
}

fn sound(table: &Table) {
    assert_eq!(table.check(), Vec::<String>::new());
}

#[test]
fn pages_come_and_go_and_so_do_their_tables() {
    let mut table = tiny();
    assert_eq!(table.nr_tables(), 1);
    table.map(Gfn::new(5), Level::PAGE, owned(100)).unwrap();
    assert_eq!(table.nr_tables(), 3, "the root and one table at each of the two other levels");
    table.map(Gfn::new(6), Level::PAGE, owned(50)).unwrap();
    table.map(Gfn::new(63), Level::PAGE, owned(7)).unwrap();
    assert_eq!(table.nr_tables(), 5);
    assert_eq!(table.translate(Gfn::new(5)), Some(Pfn::new(100)));
    assert_eq!(table.translate(Gfn::new(4)), None);
    assert_eq!(table.page(Gfn::new(4)), Err(TableError::Absent));
    sound(&table);
    assert_eq!(table.clear(Gfn::new(5), Level::PAGE), Ok(Entry::Leaf(owned(100))));
    assert_eq!(table.nr_tables(), 5, "page 6 still needs them");
    assert_eq!(table.clear(Gfn::new(6), Level::PAGE), Ok(Entry::Leaf(owned(50))));
    assert_eq!(table.nr_tables(), 3);
    assert_eq!(table.clear(Gfn::new(6), Level::PAGE), Err(TableError::Absent));
    assert_eq!(table.clear(Gfn::new(63), Level::PAGE), Ok(Entry::Leaf(owned(7))));
    assert_eq!(table.nr_tables(), 1);
    sound(&table);
}

#[test]
fn an_annotation_keeps_its_table() {
    let mut table = tiny();
    table.map(Gfn::new(5), Level::PAGE, owned(100)).unwrap();
    table.annotate(Gfn::new(5), Annotation::HostDonation, 0x40).unwrap();
    assert_eq!(table.nr_tables(), 3);
    let found = Entry::Annotated(Annotation::HostDonation, 0x40);
    assert_eq!(table.lookup(Gfn::new(5)), Ok((Level::PAGE, found)));
    assert_eq!(table.page(Gfn::new(5)), Err(TableError::Absent));
    let again = table.annotate(Gfn::new(5), Annotation::HostDonation, 0x40);
    assert_eq!(again, Err(TableError::Unchanged));
    table.annotate(Gfn::new(5), Annotation::GuestPoisoned, 0).unwrap();
    assert_eq!(table.page(Gfn::new(5)), Err(TableError::Absent));
    sound(&table);
    table.clear(Gfn::new(5), Level::PAGE).unwrap();
    assert_eq!(table.nr_tables(), 1);
    sound(&table);
}

#[test]
fn mapping_the_same_again_or_only_other_permissions_is_refused() {
    let mut table = tiny();
    table.map(Gfn::new(1), Level::PAGE, owned(9)).unwrap();
    let before = table.trace.len();
    assert_eq!(table.map(Gfn::new(1), Level::PAGE, owned(9)), Err(TableError::Unchanged));
    let read_only = Leaf { prot: Prot::R, ..owned(9) };
    assert_eq!(table.map(Gfn::new(1), Level::PAGE, read_only), Err(TableError::Unchanged));
    assert_eq!(table.trace.len(), before, "nothing was written");
    assert_eq!(Errno::from(TableError::Unchanged), Errno::EAGAIN);
    // A page state is more than a permission.
    table.map(Gfn::new(1), Level::PAGE, leaf(9, PageState::SharedOwned)).unwrap();
    assert_eq!(table.page(Gfn::new(1)), Ok(leaf(9, PageState::SharedOwned)));
}

use crate::error::Errno;

fn broke_before_made(trace: &[(Pte, Pte)]) -> bool {
    trace.iter().all(|(old, new)| !(old.is_valid() && new.is_valid()) || old == new)
}

#[test]
fn a_valid_entry_is_broken_before_another_is_made() {
    let mut table = tiny();
    table.map(Gfn::new(1), Level::PAGE, owned(9)).unwrap();
    table.trace.clear();
    table.map(Gfn::new(1), Level::PAGE, leaf(9, PageState::SharedOwned)).unwrap();
    table.map(Gfn::new(1), Level::PAGE, leaf(10, PageState::SharedOwned)).unwrap();
    assert_eq!(table.trace.len(), 4, "each change is a break and a make");
    assert_eq!(table.trace[0].1, Pte::LOCKED);
    assert!(broke_before_made(&table.trace));
    sound(&table);
}

#[test]
fn blocks_resolve_and_are_neither_split_nor_merged_by_accident() {
    let mut table = tiny();
    table.map(Gfn::new(4), Level::BLOCK_2M, owned(40)).unwrap();
    table.map(Gfn::new(16), Level::BLOCK_1G, owned(160)).unwrap();
    assert_eq!(table.translate(Gfn::new(6)), Some(Pfn::new(42)));
    assert_eq!(table.translate(Gfn::new(31)), Some(Pfn::new(175)));
    assert_eq!(table.translate(Gfn::new(32)), None);
    for gfn in [6, 20] {
        assert_eq!(table.page(Gfn::new(gfn)), Err(TableError::Block));
        assert_eq!(table.map(Gfn::new(gfn), Level::PAGE, owned(1)), Err(TableError::Block));
        assert_eq!(table.clear(Gfn::new(gfn), Level::PAGE), Err(TableError::Block));
    }
    table.map(Gfn::new(8), Level::PAGE, owned(80)).unwrap();
    let over = table.map(Gfn::new(8), Level::BLOCK_2M, owned(80));
    assert_eq!(over, Err(TableError::TableInTheWay));
    let over = table.clear(Gfn::new(8), Level::BLOCK_2M);
    assert_eq!(over, Err(TableError::TableInTheWay));
    let entries: Vec<_> = table.entries().map(|(gfn, level, _)| (gfn.get(), level)).collect();
    assert_eq!(entries, [(4, Level::BLOCK_2M), (8, Level::PAGE), (16, Level::BLOCK_1G)]);
    assert_eq!(table.clear(Gfn::new(4), Level::BLOCK_2M), Ok(Entry::Leaf(owned(40))));
    sound(&table);
}

#[test]
fn impossible_mappings_are_refused() {
    let mut table = tiny();
    let invalid = Err(TableError::Invalid);
    assert_eq!(table.map(Gfn::new(5), Level::BLOCK_2M, owned(40)), invalid, "gfn misaligned");
    assert_eq!(table.map(Gfn::new(4), Level::BLOCK_2M, owned(41)), invalid, "pfn misaligned");
    assert_eq!(table.map(Gfn::new(4), Level::PAGE, owned(u64::MAX)), invalid, "no such frame");
    let mut flat = Table::new(TableShape::new(1, 4, 2).unwrap()).unwrap();
    assert_eq!(flat.map(Gfn::new(0), Level::BLOCK_2M, owned(0)), invalid, "above the root");
    flat.map(Gfn::new(15), Level::PAGE, owned(0)).unwrap();
    assert_eq!(table.nr_tables(), 1);
}

#[test]
fn every_guest_address_has_an_answer() {
    let mut table = tiny();
    for gfn in [64, 65, 1 << 36, 1 << 52, u64::MAX].map(Gfn::new) {
        let beyond = TableError::BeyondIpa;
        assert_eq!(table.lookup(gfn), Err(beyond));
        assert_eq!(table.translate(gfn), None);
        assert_eq!(table.map(gfn, Level::PAGE, owned(1)), Err(beyond));
        assert_eq!(table.annotate(gfn, Annotation::GuestPoisoned, 0), Err(beyond));
        assert_eq!(table.clear(gfn, Level::PAGE), Err(beyond));
        assert_eq!(table.reserve([(gfn, 1)].into_iter()), Err(beyond));
        assert_eq!(table.next_entry(gfn), None);
    }
    assert_eq!(table.reserve([(Gfn::new(1), u64::MAX)].into_iter()), Err(TableError::BeyondIpa));
    table.reserve([(Gfn::new(1), 0)].into_iter()).unwrap();
}

#[test]
fn running_out_of_tables_changes_nothing() {
    let shape = TableShape::new(3, 2, 2).unwrap();
    assert_eq!(Table::with_limit(shape, 0).map(|_| ()), Err(TableError::NoMemory));
    let mut table = Table::with_limit(shape, 3).unwrap();
    table.map(Gfn::new(0), Level::PAGE, owned(1)).unwrap();
    let before = table.trace.len();
    let no_memory = Err(TableError::NoMemory);
    assert_eq!(table.map(Gfn::new(4), Level::PAGE, owned(2)), no_memory);
    assert_eq!(table.map(Gfn::new(16), Level::PAGE, owned(2)), no_memory);
    assert_eq!(table.annotate(Gfn::new(16), Annotation::HostDonation, 2), no_memory);
    assert_eq!(table.reserve([(Gfn::new(0), 5)].into_iter()), no_memory);
    assert_eq!(table.trace.len(), before);
    table.reserve([(Gfn::new(0), 4)].into_iter()).unwrap();
    table.map(Gfn::new(1), Level::PAGE, owned(2)).unwrap();
    sound(&table);
    table.clear(Gfn::new(0), Level::PAGE).unwrap();
    table.clear(Gfn::new(1), Level::PAGE).unwrap();
    table.map(Gfn::new(16), Level::PAGE, owned(2)).unwrap();
    sound(&table);
}

#[test]
fn what_was_reserved_is_what_is_needed() {
    let shape = TableShape::new(3, 2, 2).unwrap();
    for start in 0..64_u64 {
        for nr in 1..=64 - start {
            let mut table = Table::new(shape).unwrap();
            table.reserve([(Gfn::new(start), nr)].into_iter()).unwrap();
            let nr_spare = table.spare.len();
            // Not a table more than these: mapping must do with what was reserved.
            table.limit = 1 + nr_spare;
            for gfn in start..start + nr {
                table.map(Gfn::new(gfn), Level::PAGE, owned(gfn)).unwrap();
            }
            assert_eq!(table.nr_tables(), 1 + nr_spare, "{nr} pages from {start}");
            assert!(table.spare.is_empty());
        }
    }
}

#[test]
fn runs_in_one_table_reserve_it_once() {
    let mut table = tiny();
    let runs = [(0, 1), (2, 1), (5, 1), (17, 2)].map(|(gfn, nr)| (Gfn::new(gfn), nr));
    table.reserve(runs.into_iter()).unwrap();
    assert_eq!(table.spare.len(), 5, "two of the middle level, three of the lowest");
}

/// The table against a map, over a long random sequence.
#[test]
fn behaves_like_a_map_of_pages() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 33) % below
    };
    let mut table = tiny();
    let mut model: BTreeMap<u64, Entry> = BTreeMap::new();
    let states = [PageState::Owned, PageState::SharedOwned, PageState::SharedBorrowed];
    for _ in 0..20_000 {
        let gfn = random(64);
        match random(4) {
            0 | 1 => {
                let new = leaf(random(8), states[random(3) as usize]);
                let entry = Entry::Leaf(new);
                let expected = match model.get(&gfn) {
                    Some(old) if *old == entry => Err(TableError::Unchanged),
                    _ => Ok(()),
                };
                assert_eq!(table.map(Gfn::new(gfn), Level::PAGE, new), expected);
                model.insert(gfn, entry);
            }
            2 => {
                let payload = random(4) << 4;
                let entry = Entry::Annotated(Annotation::HostDonation, payload);
                let expected = match model.get(&gfn) {
                    Some(old) if *old == entry => Err(TableError::Unchanged),
                    _ => Ok(()),
                };
                let got = table.annotate(Gfn::new(gfn), Annotation::HostDonation, payload);
                assert_eq!(got, expected);
                model.insert(gfn, entry);
            }
            _ => {
                let expected = model.remove(&gfn).ok_or(TableError::Absent);
                assert_eq!(table.clear(Gfn::new(gfn), Level::PAGE), expected);
            }
        }
        assert!(broke_before_made(&table.trace));
        table.trace.clear();
        let entries = table.entries().map(|(gfn, _, entry)| (gfn.get(), entry));
        assert!(entries.eq(model.iter().map(|(&gfn, &entry)| (gfn, entry))));
        sound(&table);
    }
}
