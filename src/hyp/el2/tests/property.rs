//! Random hosts and guests that mostly do what could work, on every profile: rules, specification and the model agree
//! after each act, and what breaks them shrinks to few acts.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};

use super::model::{BLOCK, Model, Own};
use super::play::{Act, NR_VMS, Play, Who};
use super::*;
use crate::hyp::el2::guest_call::NO_POISON;
use crate::hyp::el2::hostile::Flaw;
use crate::hyp::el2::invariants::trace::{Kind, Step};

/// Frames and addresses that much is done with: alone, at the ends of blocks, and those that are nobody's to give.
const FRAMES: [u64; 11] = [
    GUEST,
    GUEST + 1,
    GUEST + 2,
    GUEST + 3,
    GUEST + 511,
    GUEST + BLOCK,
    GUEST + BLOCK + 1,
    GUEST + 1023,
    DEVICE,
    NO_MAP,
    CARVEOUT,
];
const GFNS: [u64; 9] = [0, 1, 2, 3, 0x1ff, 0x200, 0x201, 0x3ff, 0x400];

#[derive(Clone, Copy, Debug)]
pub(super) enum What {
    Load,
    Put,
    Donate,
    DonateList,
    Lend,
    Unlend,
    Protect,
    Relax,
    Show,
    Hide,
    GiveUp,
    Split,
    ShareHyp,
    UnshareHyp,
    FfaShare,
    FfaDonate,
    FfaReclaim,
    MapDma,
    UnmapDma,
    Force,
    Die,
    Reclaim,
    End,
    TearDown,
    Touch,
    VcpuTouch,
}

/// What somebody wants to do; with whom and with what depends on what there is then.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wish {
    what: What,
    cpu: usize,
    vm: usize,
    picks: [u8; 3],
}

pub(super) fn wishes(most: usize) -> impl Strategy<Value = Vec<Wish>> {
    use What::*;
    let what = prop_oneof![
        8 => Just(Load),
        3 => Just(Put),
        14 => Just(Donate),
        4 => Just(DonateList),
        10 => Just(Lend),
        5 => Just(Unlend),
        1 => Just(Protect),
        1 => Just(Relax),
        8 => Just(Show),
        6 => Just(Hide),
        3 => Just(GiveUp),
        3 => Just(Split),
        4 => Just(ShareHyp),
        3 => Just(UnshareHyp),
        2 => Just(FfaShare),
        2 => Just(FfaDonate),
        3 => Just(FfaReclaim),
        2 => Just(MapDma),
        2 => Just(UnmapDma),
        5 => Just(Force),
        2 => Just(Die),
        4 => Just(Reclaim),
        1 => Just(End),
        3 => Just(TearDown),
        6 => Just(Touch),
        12 => Just(VcpuTouch),
    ];
    let wish = (what, 0..2_usize, 0..NR_VMS, any::<[u8; 3]>());
    vec(wish.prop_map(|(what, cpu, vm, picks)| Wish { what, cpu, vm, picks }), 1..most)
}

/// One that fits, three times of four, if there is one.
fn pick(pick: u8, all: &[u64], fits: impl Fn(u64) -> bool) -> u64 {
    let fitting: Vec<_> = all.iter().copied().filter(|&one| fits(one)).collect();
    let from = if pick % 4 == 3 || fitting.is_empty() { all } else { &fitting };
    from[usize::from(pick / 4) % from.len()]
}

impl Wish {
    fn frame(self, model: &Model, fits: impl Fn(&Own) -> bool) -> u64 {
        let is_memory = |pfn| !matches!(pfn, DEVICE | NO_MAP | CARVEOUT);
        pick(self.picks[0], &FRAMES, |pfn| is_memory(pfn) && fits(&model.own(pfn)))
    }

    /// Mostly one page; where one can be, at times a block.
    fn size(self) -> u64 {
        if self.picks[2] % 6 == 5 { BLOCK } else { 1 }
    }

    /// What the profile has instead, mostly, if it has not this.
    fn what(self, profile: Profile) -> What {
        let is_odd = self.picks[2] % 8 == 7;
        match self.what {
            What::Split if !profile.splits() && !is_odd => What::Donate,
            What::DonateList | What::FfaDonate | What::MapDma | What::UnmapDma | What::GiveUp
                if !profile.is_android() && !is_odd =>
            {
                What::Show
            }
            what => what,
        }
    }

    /// With the CPU and the VM that could do it, mostly.
    fn fitted(self, play: &Play) -> Self {
        let what = self.what(play.model.profile);
        let wants_protected = match what {
            What::Lend | What::Unlend | What::Protect | What::Relax => false,
            What::Donate
            | What::DonateList
            | What::Show
            | What::Hide
            | What::GiveUp
            | What::Split
            | What::VcpuTouch => true,
            _ => return Self { what, ..self },
        };
        let is_odd = self.picks[0] % 8 == 7;
        let fits = |vm: usize| play.model.vms[vm].protected == wants_protected;
        let cpus = [self.cpu, 1 - self.cpu];
        let cpu = cpus.into_iter().find(|&cpu| play.loaded[cpu].is_some_and(|(vm, _)| fits(vm)));
        let vm = (self.vm..NR_VMS).chain(0..self.vm).find(|&vm| fits(vm));
        match (is_odd, cpu, vm) {
            (false, cpu, Some(vm)) => Self { what, cpu: cpu.unwrap_or(self.cpu), vm, ..self },
            _ => Self { what, ..self },
        }
    }

    pub(super) fn act(self, play: &Play) -> Act {
        let Self { what, cpu, vm, picks } = self.fitted(play);
        let model = &play.model;
        let here = play.loaded[cpu].map(|(vm, _)| vm);
        let state =
            |vm: Option<usize>, gfn| vm.map_or(State::NoPage, |vm| model.vms[vm].state(gfn));
        let gfn = |vm, wanted: State| pick(picks[1], &GFNS, |gfn| state(vm, gfn) == wanted);
        let is_host = |own: &Own| *own == Own::Host;
        let (pfn_to_give, gfn_to_fill) = (self.frame(model, is_host), gfn(here, State::NoPage));
        let align = |at: u64, nr: u64| at - at % nr;
        let nr = self.size();
        let (pfn, gfn_to) = (align(pfn_to_give, nr), align(gfn_to_fill, nr));
        let run = [0, 0, 0, 1, 2, 3, BLOCK, 2 * BLOCK][usize::from(picks[2]) % 8];
        match what {
            What::Load => Act::Load { cpu, vm, idx: u64::from(picks[0] % 2) },
            What::Put => Act::Put { cpu },
            What::Donate => Act::Donate { cpu, pfn, gfn: gfn_to, nr },
            What::DonateList => {
                let all = [(0, 0), (1, 1), (2, 3), (4, 4), (5, 5)];
                let list = all[..usize::from(picks[2]) % 6].iter().map(|&(frame, at)| {
                    let nr = if frame == 5 { BLOCK } else { 1 };
                    let pfn = FRAMES[(frame + usize::from(picks[0] / 64)) % FRAMES.len()];
                    let gfn = GFNS[(at + usize::from(picks[1] / 64)) % GFNS.len()];
                    (align(pfn, nr), align(gfn, nr), nr)
                });
                Act::DonateList { cpu, list: list.collect() }
            }
            What::Lend => {
                let lendable = |own: &Own| matches!(own, Own::Host | Own::Lent(_));
                Act::Lend { cpu, pfn: align(self.frame(model, lendable), nr), gfn: gfn_to, nr }
            }
            What::Unlend => {
                let gfn = gfn(Some(vm), State::SharedBorrowed);
                let nr_there = model.vms[vm].piece(gfn).map_or(1, |(_, piece)| piece.nr);
                let nr = if picks[2] % 5 == 4 { nr } else { nr_there };
                Act::Unlend { vm, gfn: align(gfn, nr_there), nr }
            }
            What::Protect => Act::Protect { vm, gfn: gfn(Some(vm), State::SharedBorrowed) },
            What::Relax => Act::Relax { cpu, gfn: gfn(here, State::SharedBorrowed) },
            What::Show => Act::Show { cpu, gfn: gfn(here, State::Owned), nr: run },
            What::Hide => Act::Hide { cpu, gfn: gfn(here, State::SharedOwned), nr: run },
            What::GiveUp => {
                let flags = if picks[2] % 3 == 2 { NO_POISON } else { 0 };
                Act::GiveUp { cpu, gfn: gfn(here, State::Owned), flags }
            }
            What::Split => Act::Split { cpu, gfn: align(gfn(here, State::Owned), BLOCK) },
            What::ShareHyp => Act::ShareHyp { pfn: self.frame(model, is_host) },
            What::UnshareHyp => {
                Act::UnshareHyp { pfn: self.frame(model, |own| *own == Own::ShownToHyp) }
            }
            What::FfaShare => Act::FfaShare { pfn: self.frame(model, is_host) },
            What::FfaDonate => Act::FfaDonate { pfn, nr: 1 },
            What::FfaReclaim => Act::FfaReclaim { nth: usize::from(picks[0]) },
            What::MapDma => Act::MapDma { pfn: self.frame(model, is_host) },
            What::UnmapDma => {
                Act::UnmapDma { pfn: pick(picks[0], &FRAMES, |pfn| model.dma.contains_key(&pfn)) }
            }
            What::Force => {
                Act::Force { pfn: self.frame(model, |own| matches!(own, Own::Guest(..))) }
            }
            What::Die => Act::Die { vm },
            What::Reclaim => {
                let vm = (0..NR_VMS).find(|&vm| model.vms[vm].dying).unwrap_or(vm);
                Act::Reclaim { vm, gfn: gfn(Some(vm), State::Owned) }
            }
            What::End => Act::End { vm },
            What::TearDown => Act::TearDown { vm },
            What::Touch => {
                let who = [Who::User, Who::Uaccess, Who::Kernel, Who::Device];
                let who = who[usize::from(picks[1]) % who.len()];
                let pfn = self.frame(model, |own| matches!(own, Own::Guest(..)));
                Act::Touch { who, cpu, pfn, stores: picks[2] % 2 == 0 }
            }
            What::VcpuTouch => {
                let gfn = pick(picks[1], &GFNS, |gfn| state(here, gfn) != State::NoPage);
                Act::VcpuTouch { cpu, gfn, stores: picks[2] % 4 != 0 }
            }
        }
    }
}

/// A play of its beginning: a protected guest runs on one CPU, another guest on the other.
pub(super) fn opened(world: World, profile: Profile) -> Play {
    let mut play = Play::new(world, profile);
    for (cpu, vm) in [(0, 0), (1, 2)] {
        play.step(&Act::Load { cpu, vm, idx: 0 }, None).expect("a vCPU is loaded");
    }
    play
}

fn perform(profile: Profile, wishes: &[Wish], flaw: Option<Flaw>) -> Result<Play, String> {
    let mut play = opened(World::with(profile), profile);
    for (nth, wish) in wishes.iter().enumerate() {
        let act = wish.act(&play);
        play.step(&act, flaw).map_err(|wrong| format!("act {nth}, {act:x?}: {wrong}"))?;
    }
    Ok(play)
}

pub(super) const PROFILES: [Profile; 3] =
    [Profile::Mainline72, Profile::Android618, Profile::HugeProtected];

/// `PROPTEST_CASES` asks for more.
pub(super) fn runner(nr_cases: u32) -> TestRunner {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|nr| nr.parse().ok());
    let config = Config {
        cases: cases.unwrap_or(nr_cases),
        failure_persistence: None,
        max_shrink_iters: 80,
        ..Config::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    TestRunner::new_with_rng(config, rng)
}

#[test]
pub(super) fn any_host_and_guests_keep_the_rules() {
    for profile in PROFILES {
        let answers = std::cell::RefCell::new(std::collections::BTreeMap::<String, u64>::new());
        let run = runner(10).run(&wishes(60), |wishes| {
            let play = perform(profile, &wishes, None).map_err(TestCaseError::fail)?;
            for (what, nr) in play.answers {
                *answers.borrow_mut().entry(what).or_default() += nr;
            }
            Ok(())
        });
        run.unwrap_or_else(|error| panic!("{profile:?}: {error}"));
        let answers = answers.into_inner();
        println!("{profile:?}: {answers:#?}");
        let done: Vec<_> = answers.keys().filter_map(|what| what.strip_suffix(" Ok(())")).collect();
        for wanted in ["Donate", "Lend", "Unlend", "Show", "Hide", "Force", "TearDown", "ShareHyp"]
        {
            assert!(done.contains(&wanted), "{profile:?}: no {wanted} that was done");
        }
        let nr = |ok: bool| -> u64 {
            answers
                .iter()
                .filter(|(what, _)| what.ends_with(" Ok(())") == ok)
                .map(|(_, nr)| nr)
                .sum()
        };
        assert!(nr(true) > nr(false), "most could work: {} and {}", nr(true), nr(false));
        assert!(nr(false) > 100, "and some not: {}", nr(false));
    }
}

#[test]
pub(super) fn there_and_back_is_nothing() {
    for profile in PROFILES {
        let nr_back = std::cell::Cell::new(0);
        let run = runner(2).run(&wishes(30), |wishes| {
            let mut play = perform(profile, &wishes, None).map_err(TestCaseError::fail)?;
            for &pfn in &FRAMES[..5] {
                let ways = [
                    (Act::ShareHyp { pfn }, Act::UnshareHyp { pfn }),
                    (Act::FfaShare { pfn }, Act::FfaReclaim { nth: usize::MAX }),
                    (Act::MapDma { pfn }, Act::UnmapDma { pfn }),
                ];
                for (there, back) in ways {
                    nr_back.set(nr_back.get() + go(&mut play, &there, &back)?);
                }
            }
            for gfn in [0, 1, 0x200] {
                for (cpu, nr) in [(0, 1), (1, 1), (0, BLOCK), (1, BLOCK)] {
                    let Some((vm, _)) = play.loaded[cpu] else { continue };
                    let show = (Act::Show { cpu, gfn, nr }, Act::Hide { cpu, gfn, nr });
                    let lend = Act::Lend { cpu, pfn: GUEST + BLOCK, gfn, nr };
                    for (there, back) in [show, (lend, Act::Unlend { vm, gfn, nr })] {
                        nr_back.set(nr_back.get() + go(&mut play, &there, &back)?);
                    }
                }
            }
            Ok(())
        });
        run.unwrap_or_else(|error| panic!("{profile:?}: {error}"));
        assert!(nr_back.get() > 10, "{profile:?}: {}", nr_back.get());
    }
}

/// 16: one way and back, if there is a way.
fn go(play: &mut Play, there: &Act, back: &Act) -> Result<u32, TestCaseError> {
    // The secure world's last run is the one that it was just shown.
    let back = match back {
        Act::FfaReclaim { .. } => Act::FfaReclaim { nth: play.nr_ffa() },
        other => other.clone(),
    };
    let before = Snapshot::of_heads(&play.world.el2);
    let was = play.nr_done();
    play.step(there, None).map_err(TestCaseError::fail)?;
    if play.nr_done() == was || Snapshot::of_heads(&play.world.el2) == before {
        return Ok(0);
    }
    play.step(&back, None).map_err(TestCaseError::fail)?;
    let after = Snapshot::of_heads(&play.world.el2);
    // The vCPU's list may have been emptied on the way.
    let kind = Kind::RefusedAfterRefill;
    let left = Step { before: &before, after: &after, el2: &play.world.el2, kind }.wrong();
    prop_assert_eq!(left, None, "{:x?} and {:x?}", there, back);
    Ok(1)
}

#[test]
fn mistakes_with_translations_are_found_and_told_in_few_acts() {
    are_found(&Flaw::ALL[..2]);
}

#[test]
fn mistakes_with_bytes_and_refusals_are_found_and_told_in_few_acts() {
    are_found(&Flaw::ALL[2..4]);
}

#[test]
fn all_other_mistakes_are_found_and_told_in_few_acts() {
    are_found(&Flaw::ALL[4..]);
}

fn are_found(flaws: &[Flaw]) {
    for &flaw in flaws {
        let run = runner(100).run(&wishes(30), |wishes| {
            perform(Profile::Mainline72, &wishes, Some(flaw)).map(drop).map_err(TestCaseError::fail)
        });
        match run {
            Err(TestError::Fail(why, wishes)) => {
                println!("{flaw:?} in {}: {why}", wishes.len());
                assert!(wishes.len() <= 5, "{flaw:?}: {wishes:#?}");
            }
            other => panic!("nobody notices {flaw:?}: {other:?}"),
        }
    }
}
