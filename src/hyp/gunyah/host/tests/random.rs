//! Any ranges at any time, against a list of pages.

use super::*;
use proptest::prelude::*;

const NR_GFNS: u64 = 1100;

#[derive(Clone, Debug)]
struct Step {
    what: u8,
    guest: usize,
    runs: Vec<(u64, u64, u64)>,
    flag: bool,
}

fn step() -> impl Strategy<Value = Step> {
    let nr = prop_oneof![1_u64..8, 1_u64..600, Just(512)];
    let near = prop_oneof![0_u64..20, Just(0), Just(512)];
    let run = (near.clone(), near, nr);
    (0_u8..10, 0_usize..2, prop::collection::vec(run, 1..4), any::<bool>())
        .prop_map(|(what, guest, runs, flag)| Step { what, guest, runs, flag })
}

type Pages = std::collections::BTreeMap<u64, (u64, Side)>;

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn memory_is_where_the_list_says(steps in prop::collection::vec(step(), 1..24)) {
        let scene = Scene::new();
        let mut guests = [scene.guest(), scene.guest()];
        let mut lists: [Pages; 2] = Default::default();
        for Step { what, guest: nth, runs, flag } in steps {
            let runs: Vec<_> = runs.into_iter().map(|(gfn, pfn, nr)| run(gfn, pfn, nr)).collect();
            let pages: Vec<(u64, u64)> = runs.iter()
                .flat_map(|run| (0..run.nr_pages).map(|at| (run.gfn.get() + at, run.pfn.get() + at)))
                .collect();
            let sets = [0, 1].map(|which| pages.iter()
                .map(|page| if which == 0 { page.0 } else { page.1 })
                .collect::<std::collections::BTreeSet<_>>().len());
            let is_sound = sets == [pages.len(); 2];
            let side = if flag { Side::Lent } else { Side::Shared };
            let taken: std::collections::BTreeSet<u64> =
                lists.iter().flat_map(|list| list.values().map(|page| page.0)).collect();
            let list = &mut lists[nth];
            let mut wanted = list.clone();
            let (answer, fits) = match what {
                0..4 => {
                    let fits = if pages.iter().any(|page| list.contains_key(&page.0)) {
                        Err(Errno::EAGAIN)
                    } else if pages.iter().any(|page| page.1 >= NR_PAGES || taken.contains(&page.1)) {
                        Err(Errno::EINVAL)
                    } else {
                        Ok(())
                    };
                    wanted.extend(pages.iter().map(|&(gfn, pfn)| (gfn, (pfn, side))));
                    (guests[nth].provide(&runs, side, true, &mut || ()), fits)
                }
                4..7 => {
                    let turns = |page: &(u64, u64)| list.get(&page.0).is_some_and(|has| has.0 == page.1 && has.1 != side);
                    let fits = if pages.iter().all(turns) { Ok(()) } else { Err(Errno::EAGAIN) };
                    wanted.extend(pages.iter().map(|&(gfn, pfn)| (gfn, (pfn, side))));
                    (guests[nth].turn(&runs, side, &mut || ()), fits)
                }
                _ => {
                    let is_other = |page: &(u64, u64)| list.get(&page.0).is_some_and(|has| has.0 != page.1);
                    let fits = if pages.iter().any(is_other) { Err(Errno::EAGAIN) } else { Ok(()) };
                    wanted.retain(|gfn, _| !pages.iter().any(|page| page.0 == *gfn));
                    let contents = if flag { Contents::Clear } else { Contents::Keep };
                    (guests[nth].reclaim(&runs, contents), fits)
                }
            };
            let fits = if is_sound { fits } else { Err(Errno::EINVAL) };
            prop_assert_eq!(answer, fits, "{} {:?}", what, runs);
            if fits.is_ok() {
                *list = wanted;
            }
            for (guest, list) in guests.iter().zip(&lists) {
                for gfn in 0..NR_GFNS {
                    let has = guest.given(Gfn::new(gfn), 1).0;
                    prop_assert_eq!(has.map(|has| (has.run.pfn.get(), has.side)), list.get(&gfn).copied());
                }
            }
            scene.sound(&[&guests[0], &guests[1]]);
        }
    }
}
