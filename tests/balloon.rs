//! Guests that balloon in and out for an hour, in a few seconds: the pool is afterwards as it was before.

mod common;
#[path = "common/taint.rs"]
mod taint;

use std::sync::atomic::{AtomicU64, Ordering};

use common::Capability;
use gmem::addr::ByteSize;
use gmem::audit;
use gmem::error::{Error, ErrorKind};
use gmem::geometry::FolioSize;
use gmem::range::PgoffRange;
use gmem::{
    Account, ArenaBacking, Commitment, ContentPolicy, FolioPool, GuestMemfd, HostView, PartSpec,
    PrivatePlacement, Visibility, Zone,
};
use taint::{assert_nobodys, assert_owners, at, range, settled, write};

const FOLIO: u64 = 512;
const NR_GUESTS: u64 = 4;
const NR_ROUNDS: u64 = 4000;
/// Two folios and a tail.
const NR_PAGES: u64 = 2 * FOLIO + 40;

/// xorshift64*: the same story each time, but for the scheduler's part.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }

    fn of<T: Copy, const N: usize>(&mut self, all: [T; N]) -> T {
        all[usize::try_from(self.below(N as u64)).unwrap()]
    }

    /// A few pages, or a folio, or more.
    fn range(&mut self) -> PgoffRange {
        let start = self.below(NR_PAGES);
        let most = self.of([1, 3, 16, 64, FOLIO, NR_PAGES]);
        range(start, (1 + self.below(most)).min(NR_PAGES - start))
    }
}

/// What a page is to hold: nothing, or what was written in some round.
#[derive(Clone, Copy, PartialEq)]
struct Page {
    round: Option<u64>,
    visibility: Visibility,
}

struct Guest<'a> {
    nr: u64,
    dice: Dice,
    pool: &'a FolioPool,
    account: &'a Account,
    memfd: GuestMemfd,
    view: Option<HostView>,
    pages: Vec<Page>,
    refusals: &'a AtomicU64,
    moved: &'a AtomicU64,
}

fn create(dice: &mut Dice, pool: &FolioPool, account: &Account) -> GuestMemfd {
    loop {
        let builder = GuestMemfd::builder(ByteSize::from_pages(NR_PAGES))
            .initial(Visibility::Shared)
            .folio_size(dice.of([FolioSize::Base, FolioSize::Huge2M, FolioSize::Huge1G]))
            .zones(dice.of([&[Zone::Normal], &[Zone::Movable, Zone::Normal]] as [&[Zone]; 2]))
            .private_placement(dice.of([PrivatePlacement::MoveToNormal, PrivatePlacement::Refuse]))
            .commitment(dice.of([Commitment::Reserved, Commitment::Overcommitted]))
            .account(account);
        match builder.create(pool) {
            Ok(memfd) => return memfd,
            // Others have it all just now.
            Err(error) => assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}"),
        }
        std::thread::yield_now();
    }
}

impl<'a> Guest<'a> {
    fn new(
        nr: u64,
        pool: &'a FolioPool,
        account: &'a Account,
        [refusals, moved]: &'a [AtomicU64; 2],
    ) -> Self {
        let mut dice = Dice(0x9e37_79b9 + nr);
        let memfd = create(&mut dice, pool, account);
        let page = Page { round: None, visibility: Visibility::Shared };
        let pages = vec![page; usize::try_from(NR_PAGES).unwrap()];
        Self { nr, dice, pool, account, memfd, view: None, pages, refusals, moved }
    }

    fn owner(&self, round: u64) -> u64 {
        (self.nr << 13 | round) & 0xffff
    }

    fn of(&mut self, range: PgoffRange) -> &mut [Page] {
        let at = |page: u64| usize::try_from(page).unwrap();
        &mut self.pages[at(range.start().get())..at(range.end().get())]
    }

    /// The shared pages of a range, as runs of pages that were written in one round.
    fn shared(&mut self, range: PgoffRange) -> Vec<(PgoffRange, Option<u64>)> {
        let first = range.start().get();
        let pages: Vec<_> = (first..).zip(self.of(range).iter().copied()).collect();
        let runs = pages.chunk_by(|(_, one), (_, next)| one == next);
        let shared = runs.filter(|run| run[0].1.visibility == Visibility::Shared);
        shared.map(|run| (taint::range(run[0].0, run.len() as u64), run[0].1.round)).collect()
    }

    /// Whether it was done. There may be no memory for who was promised none.
    fn is_done<T>(&self, outcome: Result<T, Error>) -> bool {
        let kind = outcome.as_ref().map(drop).map_err(Error::kind);
        match kind {
            Ok(()) => true,
            Err(ErrorKind::Exhausted | ErrorKind::Unsupported) => {
                self.refusals.fetch_add(1, Ordering::Relaxed);
                false
            }
            Err(_) => panic!("guest {}: {}", self.nr, outcome.err().unwrap()),
        }
    }

    fn play(&mut self, round: u64) {
        let range = self.dice.range();
        match self.dice.below(100) {
            0..25 => {
                settled(|| self.memfd.punch_hole(range)).unwrap();
                self.of(range).iter_mut().for_each(|page| page.round = None);
            }
            25..35 => {
                let outcome = settled(|| self.memfd.allocate(range));
                self.is_done(outcome);
            }
            35..60 => {
                let small = range.intersection(&taint::range(range.start().get(), 20)).unwrap();
                for (pages, _) in self.shared(small) {
                    let outcome = settled(|| self.memfd.allocate(pages));
                    if self.is_done(outcome) {
                        write(&self.memfd, pages, self.owner(round));
                        self.of(pages).iter_mut().for_each(|page| page.round = Some(round));
                    }
                }
            }
            60..75 => self.convert(range),
            75..80 => {
                let to = self.dice.of([Zone::Normal, Zone::Movable]);
                if let Ok(migration) = self.memfd.migrate(range, to) {
                    let moved = migration.moved.whole_pages();
                    self.moved.fetch_add(moved, Ordering::Relaxed);
                }
            }
            80..82 => drop(self.pool.compact(FolioSize::Huge2M, Zone::Normal)),
            82..84 => drop(self.pool.scrub()),
            84..88 => {
                self.view = match self.view.take() {
                    None if common::require(Capability::Uffd) => self.memfd.map_view().ok(),
                    _ => None,
                };
            }
            88..90 => {
                self.view = None;
                let before = std::mem::replace(&mut self.memfd, {
                    // Before the old one goes, so that the two cannot be at the same place.
                    let account = self.account;
                    match GuestMemfd::builder(ByteSize::from_pages(1))
                        .account(account)
                        .create(self.pool)
                    {
                        Ok(placeholder) => placeholder,
                        Err(_) => return,
                    }
                });
                drop(before);
                self.memfd = create(&mut self.dice, self.pool, self.account);
                let all = self.memfd.pages();
                let fresh = Page { round: None, visibility: Visibility::Shared };
                self.of(all).fill(fresh);
            }
            _ => self.look(range),
        }
    }

    fn convert(&mut self, range: PgoffRange) {
        let to = self.dice.of([Visibility::Private, Visibility::Shared]);
        let content = self.dice.of([ContentPolicy::Preserve, ContentPolicy::Zero]);
        let outcome = settled(|| self.memfd.convert(range, to, content));
        if self.is_done(outcome) {
            for page in self.of(range).iter_mut().filter(|page| page.visibility != to) {
                page.visibility = to;
                if content == ContentPolicy::Zero {
                    page.round = None;
                }
            }
        }
    }

    /// Nobody else's bytes are in there, and all of its own.
    fn look(&mut self, range: PgoffRange) {
        let small = range.intersection(&taint::range(range.start().get(), 60)).unwrap();
        for (pages, round) in self.shared(small) {
            let what = format!("guest {}", self.nr);
            match round {
                Some(round) => assert_owners(&self.memfd, pages, self.owner(round), &what),
                None => {
                    let outcome = settled(|| self.memfd.allocate(pages));
                    if self.is_done(outcome) {
                        assert_nobodys(&self.memfd, pages, &what);
                    }
                }
            }
        }
        let mut byte = [0];
        assert!(settled(|| self.memfd.read(at(NR_PAGES), &mut byte)).is_err());
    }
}

fn balloon(backing: ArenaBacking) {
    // Enough for all that may be reserved at once, and not for what is not.
    let part = |nr_folios| PartSpec::new([backing], ByteSize::from_pages(nr_folios * FOLIO));
    let builder = FolioPool::builder().part(part(7), Zone::Normal).part(part(4), Zone::Movable);
    let pool = builder.create().unwrap();
    let accounts: Vec<Account> = (0..NR_GUESTS).map(|_| pool.open_account(None)).collect();
    let (before, counters) = (pool.stat(), [0, 0].map(AtomicU64::new));
    let scrubber = pool.start_scrubber(ByteSize::from_mib(6)).unwrap();
    std::thread::scope(|scope| {
        for nr in 0..NR_GUESTS {
            let (pool, account) = (&pool, &accounts[usize::try_from(nr).unwrap()]);
            let counters = &counters;
            scope.spawn(move || {
                let mut guest = Guest::new(nr, pool, account, counters);
                for round in 0..NR_ROUNDS {
                    guest.play(round);
                }
                guest.look(guest.memfd.pages());
            });
        }
    });
    assert!(scrubber.is_alive());
    let [refusals, moved] = counters.map(AtomicU64::into_inner);
    println!("{backing}: {refusals} refusals, {moved} pages moved");
    assert!(refusals > 0 && moved > 0);
    drop(scrubber);
    pool.scrub();
    for account in &accounts {
        let stat = account.stat();
        assert_eq!((stat.charged, stat.used), (ByteSize::default(), ByteSize::default()));
    }
    assert_eq!(audit::check(&pool, &[]).to_string(), "clean");
    let mut after = pool.stat();
    // Records keep their place for the next ones: as many as there were at once.
    let most = before.metadata.get() + (13 * FOLIO) * 64;
    assert!(after.metadata.get() <= most, "{before:?} {after:?}");
    after.metadata = before.metadata;
    assert_eq!(after, before);
}

#[test]
fn guests_balloon_on_the_heap() {
    balloon(ArenaBacking::Heap);
}

#[test]
fn guests_balloon_with_views() {
    balloon(ArenaBacking::Memfd);
}
