use std::collections::HashMap;

use super::*;
use crate::stage2::{PageState, Prot};

/// Frames for tables, and what was invalidated while which word stood there.
#[derive(Debug)]
struct Bench {
    free: Vec<Pfn>,
    invalidated: Vec<(u64, u64)>,
}

impl Bench {
    fn new(nr: u64) -> Self {
        Self { free: (1000..1000 + nr).map(Pfn::new).collect(), invalidated: Vec::new() }
    }
}

impl TableEnv for Bench {
    fn take(&mut self) -> Option<Pfn> {
        self.free.pop()
    }

    fn give(&mut self, pfn: Pfn) {
        self.free.push(pfn);
    }

    fn nr_free(&self) -> u64 {
        self.free.len() as u64
    }

    fn invalidate(&mut self, gfn: Gfn, nr_pages: u64) {
        self.invalidated.push((gfn.get(), nr_pages));
    }
}

/// Three levels of four entries: 64 pages, blocks of 4 pages and of 16.
fn tiny() -> Tree {
    let mut tree = Tree::new(TableShape::new(3, 2, 2).unwrap(), Pfn::new(999));
    tree.trace = Some(Vec::new());
    tree
}

fn trace(tree: &Tree) -> &[(Pte, Pte)] {
    tree.trace.as_ref().unwrap()
}

fn leaf(pfn: u64, state: PageState) -> Leaf {
    Leaf { pfn: Pfn::new(pfn), prot: Prot::RWX, state }
}

fn map(
    tree: &mut Tree,
    gfn: u64,
    nr: u64,
    level: Level,
    to: Leaf,
    env: &mut Bench,
) -> Result<(), TableError> {
    tree.map(Gfn::new(gfn), nr, level, to, Pte::leaf, env)
}

fn owned(pfn: u64) -> Leaf {
    leaf(pfn, PageState::Owned)
}

fn sound(tree: &Tree) {
    assert_eq!(tree.check(), Vec::<String>::new());
}

fn translate(tree: &Tree, gfn: u64) -> Option<u64> {
    tree.translate(Gfn::new(gfn)).map(|(pfn, _)| pfn.get())
}

#[test]
fn a_page_inside_of_a_block_leaves_its_siblings_unmapped() {
    let (mut tree, mut env) = (tiny(), Bench::new(10));
    map(&mut tree, 16, 16, Level::BLOCK_1G, owned(16), &mut env).unwrap();
    assert_eq!(translate(&tree, 30), Some(30));
    let donated = Annotation::HostDonation;
    tree.annotate(Gfn::new(21), 1, donated, 0x40, &mut env).unwrap();
    assert_eq!(env.invalidated, [(16, 16)], "all of the block was forgotten");
    assert_eq!((16..32).filter_map(|gfn| translate(&tree, gfn)).count(), 0);
    assert_eq!(
        tree.get(Gfn::new(21)).unwrap().1.decode(Level::PAGE),
        Entry::Annotated(donated, 0x40)
    );
    assert_eq!(tree.get(Gfn::new(20)), Ok((Level::PAGE, Pte::EMPTY)));
    assert_eq!(tree.get(Gfn::new(24)), Ok((Level::BLOCK_2M, Pte::EMPTY)), "where the walk stops");
    assert_eq!(tree.nr_tables(), 3);
    sound(&tree);
}

#[test]
fn a_block_over_a_table_takes_its_place() {
    let (mut tree, mut env) = (tiny(), Bench::new(10));
    map(&mut tree, 4, 2, Level::PAGE, owned(40), &mut env).unwrap();
    assert_eq!(tree.nr_tables(), 3);
    map(&mut tree, 4, 4, Level::BLOCK_2M, owned(80), &mut env).unwrap();
    assert_eq!(env.invalidated, [(4, 4)]);
    assert_eq!((tree.nr_tables(), env.free.len()), (2, 9));
    assert_eq!(
        (4..8).map(|gfn| translate(&tree, gfn)).collect::<Vec<_>>(),
        [80, 81, 82, 83].map(Some)
    );
    map(&mut tree, 0, 16, Level::BLOCK_1G, owned(160), &mut env).unwrap();
    assert_eq!((tree.nr_tables(), env.free.len()), (1, 10));
    sound(&tree);
}

#[test]
fn unmapping_part_of_a_block_unmaps_all_of_it() {
    let (mut tree, mut env) = (tiny(), Bench::new(10));
    map(&mut tree, 4, 8, Level::BLOCK_2M, owned(4), &mut env).unwrap();
    tree.unmap(Gfn::new(6), 1, &mut env).unwrap();
    assert_eq!(translate(&tree, 4), None);
    assert_eq!(translate(&tree, 8), Some(8));
    tree.unmap(Gfn::new(0), 64, &mut env).unwrap();
    assert_eq!((tree.nr_tables(), env.free.len()), (1, 10), "empty tables are given back");
    sound(&tree);
}

#[test]
fn an_annotation_keeps_its_table_and_goes_with_an_unmap() {
    let (mut tree, mut env) = (tiny(), Bench::new(10));
    map(&mut tree, 5, 1, Level::PAGE, owned(9), &mut env).unwrap();
    tree.annotate(Gfn::new(5), 1, Annotation::GuestPoisoned, 0, &mut env).unwrap();
    assert_eq!((tree.nr_tables(), &env.invalidated[..]), (3, &[(5, 1)][..]));
    tree.unmap(Gfn::new(5), 1, &mut env).unwrap();
    assert_eq!(tree.nr_tables(), 1);
    for payload in [1, 1 << 60] {
        let got = tree.annotate(Gfn::new(5), 1, Annotation::HostDonation, payload, &mut env);
        assert_eq!(got, Err(TableError::Invalid));
    }
    sound(&tree);
}

#[test]
fn what_differs_in_permissions_alone_is_not_mapped_again() {
    let (mut tree, mut env) = (tiny(), Bench::new(10));
    map(&mut tree, 5, 1, Level::PAGE, owned(9), &mut env).unwrap();
    let writes = trace(&tree).len();
    let unchanged = Err(TableError::Unchanged);
    assert_eq!(map(&mut tree, 5, 1, Level::PAGE, owned(9), &mut env), unchanged);
    let read_only = Leaf { prot: Prot::R, ..owned(9) };
    assert_eq!(map(&mut tree, 5, 1, Level::PAGE, read_only, &mut env), unchanged);
    assert_eq!(
        map(&mut tree, 4, 4, Level::PAGE, owned(8), &mut env),
        unchanged,
        "not even in part"
    );
    assert_eq!(trace(&tree).len(), writes);
    map(&mut tree, 5, 1, Level::PAGE, leaf(9, PageState::SharedOwned), &mut env).unwrap();
    let last = &trace(&tree)[writes..];
    assert_eq!((last.len(), last[0].1, env.invalidated.len()), (2, Pte::LOCKED, 1));
    let young = tree.adjust(Gfn::new(5), |pte| pte.aged(false)).unwrap();
    assert!(young.is_young() && !tree.get(Gfn::new(5)).unwrap().1.is_young());
    assert_eq!(tree.adjust(Gfn::new(6), |pte| pte), Err(TableError::Absent));
}

#[test]
fn want_of_tables_is_known_before_anything_changes() {
    for free in 0..4 {
        let (mut tree, mut env) = (tiny(), Bench::new(free));
        // Pages 14 to 17 need two tables of each level.
        let got = map(&mut tree, 14, 4, Level::PAGE, owned(14), &mut env);
        assert_eq!(got, Err(TableError::NoMemory), "{free}");
        assert_eq!((trace(&tree).len(), env.free.len() as u64), (0, free));
    }
    let (mut tree, mut env) = (tiny(), Bench::new(4));
    assert_eq!(tree.nr_missing(Gfn::new(14), 4, Level::PAGE), Ok(4));
    let mut one_by_one = Missing::default();
    for page in (14..18).map(Gfn::new) {
        tree.count_missing(page, 1, Level::PAGE, &mut one_by_one).unwrap();
    }
    assert_eq!(one_by_one.nr, 4, "none is counted twice");
    map(&mut tree, 14, 4, Level::PAGE, owned(14), &mut env).unwrap();
    assert_eq!(env.free.len(), 0);
    assert_eq!(map(&mut tree, 40, 1, Level::PAGE, owned(1), &mut env), Err(TableError::NoMemory));
    assert_eq!(map(&mut tree, 24, 4, Level::BLOCK_2M, owned(4), &mut env), Ok(()));
    tree.dismantle(&mut env);
    assert_eq!((tree.nr_tables(), env.free.len()), (1, 4));
    sound(&tree);
}

#[test]
fn impossible_ranges_are_refused() {
    let (mut tree, mut env) = (tiny(), Bench::new(10));
    let invalid = Err(TableError::Invalid);
    for (gfn, nr, pfn) in [(5, 4, 4), (4, 4, 5), (4, 3, 4), (4, 4, 1 << 36), (4, 4, u64::MAX - 3)] {
        assert_eq!(map(&mut tree, gfn, nr, Level::BLOCK_2M, owned(pfn), &mut env), invalid);
    }
    let beyond = Err(TableError::BeyondIpa);
    for gfn in [64, 1 << 40, u64::MAX].map(Gfn::new) {
        assert_eq!(tree.map(gfn, 1, Level::PAGE, owned(1), Pte::leaf, &mut env), beyond);
        assert_eq!(tree.unmap(gfn, 1, &mut env), beyond);
        assert_eq!(tree.annotate(gfn, 1, Annotation::HostDonation, 2, &mut env), beyond);
        assert_eq!(tree.get(gfn), Err(TableError::BeyondIpa));
        assert_eq!(tree.translate(gfn), None);
    }
    assert_eq!(tree.unmap(Gfn::new(1), u64::MAX, &mut env), beyond);
    assert_eq!(map(&mut tree, 60, 8, Level::PAGE, owned(1), &mut env), beyond);
    assert_eq!((trace(&tree).len(), env.free.len()), (0, 10));
}

#[test]
fn real_shapes_have_the_root_that_arm_has() {
    assert_eq!(Tree::nr_root_pages(TableShape::IPA_40), 2);
    assert_eq!(Tree::nr_root_pages(TableShape::IPA_48), 1);
    let mut env = Bench::new(3);
    let mut tree = Tree::new(TableShape::IPA_40, Pfn::new(10));
    let last = (1 << 28) - 1;
    map(&mut tree, last, 1, Level::PAGE, owned(77), &mut env).unwrap();
    assert_eq!((translate(&tree, last), tree.nr_tables()), (Some(77), 4));
    let frames: Vec<_> = tree.table_frames().map(Pfn::get).collect();
    assert_eq!(frames, [10, 11, 1002, 1001]);
    sound(&tree);
}

type Model = HashMap<u64, (Level, u64, Pte)>;

fn drop_entry(model: &mut Model, page: u64) {
    if let Some(&(level, base, _)) = model.get(&page) {
        let span = TableShape::new(3, 2, 2).unwrap().pages_at(level);
        for gfn in base..base + span {
            model.remove(&gfn);
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes minutes when interpreted")]
fn behaves_like_a_map_of_entries_and_breaks_before_it_makes() {
    let mut random = generator(7);
    let (mut tree, mut env) = (tiny(), Bench::new(64));
    let mut model = Model::new();
    for step in 0..30_000 {
        let level =
            [Level::PAGE, Level::PAGE, Level::BLOCK_2M, Level::BLOCK_1G][random(4) as usize];
        let span = tree.shape().pages_at(level);
        let base = random(64) & !(span - 1);
        tree.trace = Some(Vec::new());
        env.invalidated.clear();
        let state = [PageState::Owned, PageState::SharedOwned][random(2) as usize];
        let before = model.clone();
        match random(3) {
            0 => {
                let to = leaf(random(4) << 6 | base, state);
                let got = map(&mut tree, base, span, level, to, &mut env);
                let new = Pte::leaf(level, to).unwrap();
                let same =
                    model.get(&base).is_some_and(|&(l, b, pte)| (l, b, pte) == (level, base, new));
                assert_eq!(got, if same { Err(TableError::Unchanged) } else { Ok(()) });
                if !same {
                    (base..base + span).for_each(|gfn| drop_entry(&mut model, gfn));
                    model.extend((base..base + span).map(|gfn| (gfn, (level, base, new))));
                }
            }
            1 => {
                let payload = random(8) << 1;
                let new = Pte::annotation(Annotation::HostDonation, payload).unwrap();
                tree.annotate(Gfn::new(base), 1, Annotation::HostDonation, payload, &mut env)
                    .unwrap();
                drop_entry(&mut model, base);
                model.insert(base, (Level::PAGE, base, new));
            }
            _ => {
                let nr = random(65 - base);
                tree.unmap(Gfn::new(base), nr, &mut env).unwrap();
                (base..base + nr).for_each(|gfn| drop_entry(&mut model, gfn));
            }
        }
        for gfn in 0..64 {
            let (level, pte) = tree.get(Gfn::new(gfn)).unwrap();
            let found = (!pte.is_empty()).then_some((level, pte));
            let wanted = model.get(&gfn);
            assert_eq!(found, wanted.map(|&(level, _, pte)| (level, pte)), "step {step}, {gfn}");
            let was_valid = before.get(&gfn).filter(|(.., pte)| pte.is_valid());
            if was_valid.is_some_and(|was| wanted != Some(was)) {
                let told = env.invalidated.iter().any(|&(at, nr)| (at..at + nr).contains(&gfn));
                assert!(told, "step {step}: {gfn} changed, and who remembers it was not told");
            }
        }
        let broken = |&(old, new): &(Pte, Pte)| !(old.is_valid() && new.is_valid());
        assert!(trace(&tree).iter().all(broken));
        assert_eq!(tree.nr_tables() + env.free.len(), 65);
        if step % 16 == 0 {
            sound(&tree);
        }
    }
    tree.dismantle(&mut env);
    assert_eq!(env.free.len(), 64);
    sound(&tree);
}

/// Numbers below a bound, the same ones at every run.
fn generator(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut seed = seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1;
    move |below| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 33) % below
    }
}

#[test]
fn what_was_found_is_changed_where_it_was_found() {
    let mut env = Bench::new(8);
    let mut tree = tiny();
    let gfn = Gfn::new(21);
    let put = |pfn, state| Pte::leaf(Level::PAGE, leaf(pfn, state)).unwrap();
    let found = tree.find(gfn).unwrap();
    assert_eq!((found.pte, found.nr_missing(Level::PAGE)), (Pte::EMPTY, 2), "tables are to come");
    tree.set(gfn, found, Level::PAGE, put(5, PageState::Owned), &mut env).unwrap();
    assert_eq!((translate(&tree, 21), env.free.len()), (Some(5), 6));

    let found = tree.find(gfn).unwrap();
    assert_eq!(found.nr_missing(Level::PAGE), 0);
    let read_only = Leaf { prot: Prot::R, ..owned(5) };
    let read_only = Pte::leaf(Level::PAGE, read_only).unwrap();
    let refused = tree.set(gfn, found, Level::PAGE, read_only, &mut env);
    assert_eq!(refused, Err(TableError::Unchanged), "nothing but rights");
    let shared = put(5, PageState::SharedOwned);
    tree.set(gfn, found, Level::PAGE, shared, &mut env).unwrap();
    let steps = trace(&tree);
    assert_eq!(steps[steps.len() - 2..], [(found.pte, Pte::LOCKED), (Pte::LOCKED, shared)]);
    assert_eq!(env.invalidated, [(21, 1)]);
    sound(&tree);

    // Its neighbour keeps the tables; the last one frees them.
    map(&mut tree, 22, 1, Level::PAGE, owned(6), &mut env).unwrap();
    for (gfn, nr_free) in [(21, 6), (22, 8)] {
        let found = tree.find(Gfn::new(gfn)).unwrap();
        tree.clear(Gfn::new(gfn), found, &mut env);
        assert_eq!((translate(&tree, gfn), env.free.len()), (None, nr_free));
        sound(&tree);
    }
    let short = &mut Bench::new(1);
    let found = tree.find(gfn).unwrap();
    let refused = tree.set(gfn, found, Level::PAGE, shared, short);
    assert_eq!((refused, short.free.len()), (Err(TableError::NoMemory), 1));
    assert_eq!(tree.find(Gfn::new(64)).err(), Some(TableError::BeyondIpa));
}
