//! The model's subscribers: who is asked, who lets go, and what each has mapped.

use std::collections::{BTreeMap, BTreeSet};

use super::action::{Mood, Silence, Spot, Terms, Time};
use super::mistake::HostMistake;
use super::model::Model;
use super::step::{Answer, Refused, pages_of};
use crate::error::{Errno, ErrorKind};
use crate::hyp::iommu::DmaFaultKind;
use crate::state::Standing;

/// With what a fence fails.
pub(super) const NO_FENCE: Errno = Errno::ENODEV;

/// Somebody who subscribed, and its domain.
#[derive(Clone, Debug)]
pub(super) struct Keeper {
    /// Never used twice.
    pub(super) nr: u64,
    pub(super) terms: Terms,
    pub(super) mood: Mood,
    pub(super) can_be_fenced: bool,
    pub(super) standing: Standing,
    /// What its device finds where.
    pub(super) maps: BTreeMap<u64, u64>,
}

/// What pages are taken back for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    Conversion,
    Punch,
    Move,
    Memslot,
}

/// What somebody makes of being asked.
enum Said {
    LetsGo,
    Refuses,
    Nothing,
}

impl Keeper {
    fn says(&self) -> Said {
        match self.mood {
            Mood::LetsGo => Said::LetsGo,
            Mood::Tarries if self.terms.time == Time::Plenty => Said::LetsGo,
            Mood::Refuses => Said::Refuses,
            Mood::Loses | Mood::Tarries => Said::Nothing,
        }
    }
}

fn refused(errno: Errno) -> Refused {
    Refused(ErrorKind::SubscriberRefused, errno)
}

impl Model {
    /// Those who have a subscription, in the order in which they came.
    pub(super) fn subscribed(&self) -> Vec<usize> {
        let mut places: Vec<(u64, usize)> = self
            .keepers
            .iter()
            .enumerate()
            .filter_map(|(place, keeper)| Some((keeper.as_ref()?, place)))
            .filter(|(keeper, _)| keeper.standing != Standing::Lost)
            .map(|(keeper, place)| (keeper.nr, place))
            .collect();
        places.sort_unstable();
        places.into_iter().map(|(_, place)| place).collect()
    }

    pub(super) fn nr_subscribers(&self) -> usize {
        self.subscribed().len()
    }

    pub(super) fn keeper(&self, who: usize) -> Option<&Keeper> {
        self.keepers.get(*self.subscribed().get(who)?)?.as_ref()
    }

    fn keeper_mut(&mut self, who: usize) -> Option<&mut Keeper> {
        let place = *self.subscribed().get(who)?;
        self.keepers.get_mut(place)?.as_mut()
    }

    /// Somewhere where its device finds a page.
    pub(super) fn mapped_place(&self, who: usize, claim: u16) -> Option<u64> {
        let keeper = self.keeper(who)?;
        let nth = usize::from(claim / 4).checked_rem(keeper.maps.len())?;
        keeper.maps.keys().copied().nth(nth)
    }

    /// Whether nobody would know what it reaches, if it left.
    pub(super) fn would_be_lost(&self, who: usize) -> bool {
        self.keeper(who).is_some_and(|keeper| {
            keeper.standing == Standing::Told
                && !matches!(keeper.says(), Said::LetsGo)
                && !keeper.can_be_fenced
                && (0..self.nr_pages()).any(|page| self.is_to_have(keeper, page))
        })
    }

    fn is_to_have(&self, keeper: &Keeper, page: u64) -> bool {
        self.is_resident(page) && self.is(page, keeper.terms.side)
    }

    pub(super) fn subscribe(&mut self, terms: Terms) {
        let keeper = Keeper {
            nr: self.nr_keepers_ever,
            terms,
            mood: Mood::LetsGo,
            can_be_fenced: true,
            standing: Standing::Told,
            maps: BTreeMap::new(),
        };
        self.nr_keepers_ever += 1;
        let place = self.vacant.pop().unwrap_or(self.keepers.len());
        if place == self.keepers.len() {
            self.keepers.push(None);
        }
        if let Some(vacant) = self.keepers.get_mut(place) {
            *vacant = Some(keeper);
        }
        let pages: Vec<u64> = (0..self.nr_pages()).collect();
        self.grant_to(place, &pages);
    }

    pub(super) fn leave(&mut self, who: usize) {
        let is_lost = self.would_be_lost(who) && !self.errs(HostMistake::TheLostHoldNothing);
        let Some(&place) = self.subscribed().get(who) else { return };
        match self.keepers.get_mut(place) {
            Some(Some(keeper)) if is_lost => keeper.standing = Standing::Lost,
            Some(vacant) => {
                *vacant = None;
                self.vacant.push(place);
            }
            None => {}
        }
    }

    pub(super) fn change(&mut self, who: usize, mood: Mood, can_be_fenced: bool) {
        if let Some(keeper) = self.keeper_mut(who) {
            (keeper.mood, keeper.can_be_fenced) = (mood, can_be_fenced);
        }
    }

    pub(super) fn dma(&mut self, who: usize, at: u64, byte: u8) -> Answer {
        let lets_through = self.errs(HostMistake::FencesLetThrough);
        let Some(keeper) = self.keeper(who) else { return Answer::Done };
        if keeper.standing == Standing::FencedOff && !lets_through {
            return Answer::Dma(DmaFaultKind::Detached);
        }
        let Some(&page) = keeper.maps.get(&at) else {
            return Answer::Dma(DmaFaultKind::NotMapped);
        };
        if byte == 0 {
            return Answer::Byte(self.page(page).map_or(0, |page| page.byte));
        }
        self.fill((page, 1), byte);
        Answer::Done
    }

    /// Takes pages away from all who have them, or from none but those who are cut off for it.
    pub(super) fn take_back(&mut self, pages: &[u64], why: Why) -> Result<(), Refused> {
        let mut asked: Vec<(usize, BTreeSet<u64>)> = Vec::new();
        for (place, keeper) in self.keepers.iter().enumerate() {
            let Some(keeper) = keeper else { continue };
            let has = |page: &&u64| self.is_to_have(keeper, **page);
            let wanted: BTreeSet<u64> = pages.iter().filter(has).copied().collect();
            match keeper.standing {
                _ if wanted.is_empty() => {}
                Standing::FencedOff => {}
                Standing::Lost => return Err(refused(Errno::EBUSY)),
                Standing::Told | Standing::Leaving => asked.push((place, wanted)),
            }
        }
        let (mut outcome, mut to_be_told) = (Ok(()), Vec::new());
        for (place, wanted) in asked {
            let mistake = self.mistake;
            let Some(Some(keeper)) = self.keepers.get_mut(place) else { continue };
            let said = match keeper.says() {
                Said::Nothing if mistake == Some(HostMistake::SilenceIsConsent) => Said::LetsGo,
                Said::Refuses if mistake == Some(HostMistake::RefusalsAreFenced) => Said::Nothing,
                said => said,
            };
            let fences = keeper.terms.silence == Silence::Fences && outcome.is_ok();
            match said {
                Said::LetsGo => {
                    let keeps = match why {
                        Why::Conversion => mistake == Some(HostMistake::SubscribersKeepWhatLeaves),
                        Why::Punch => mistake == Some(HostMistake::SubscribersKeepHoles),
                        Why::Memslot => mistake == Some(HostMistake::MemslotsMoveNothing),
                        Why::Move => false,
                    };
                    if !keeps {
                        // Wherever it has them.
                        keeper.maps.retain(|_, page| !wanted.contains(page));
                    }
                    to_be_told.push((place, wanted));
                }
                Said::Refuses => outcome = outcome.and(Err(refused(Errno::EBUSY))),
                Said::Nothing if fences && keeper.can_be_fenced => {
                    keeper.standing = Standing::FencedOff;
                }
                Said::Nothing => {
                    let errno = if fences { NO_FENCE } else { Errno::ETIMEDOUT };
                    outcome = outcome.and(Err(refused(errno)));
                    to_be_told.push((place, wanted));
                }
            }
        }
        if outcome.is_err() && !self.errs(HostMistake::NothingIsGivenBack) {
            for (place, wanted) in to_be_told {
                let wanted: Vec<u64> = wanted.into_iter().collect();
                self.grant_to(place, &wanted);
            }
        }
        outcome
    }

    /// Takes pages away where nobody can refuse: who does not let go is cut off.
    pub(super) fn part_from_all(&mut self, pages: &[u64]) {
        for place in 0..self.keepers.len() {
            let Some(Some(keeper)) = self.keepers.get(place) else { continue };
            let has = |page: &&u64| self.is_to_have(keeper, **page);
            let wanted: BTreeSet<u64> = pages.iter().filter(has).copied().collect();
            let lets_go = matches!(keeper.says(), Said::LetsGo);
            let keeps = self.errs(HostMistake::MemslotsMoveNothing);
            let Some(Some(keeper)) = self.keepers.get_mut(place) else { continue };
            if keeper.standing != Standing::Told || wanted.is_empty() {
                continue;
            }
            if !lets_go {
                keeper.standing = Standing::FencedOff;
            } else if !keeps {
                keeper.maps.retain(|_, page| !wanted.contains(page));
            }
        }
    }

    /// Whether somebody would not let go of pages of memslots, and cannot be cut off.
    pub(super) fn would_lose_a_subscriber(&self) -> bool {
        let mut keepers = self.keepers.iter().flatten();
        keepers.any(|keeper| {
            let has = |page| self.is_to_have(keeper, page);
            keeper.standing == Standing::Told
                && !matches!(keeper.says(), Said::LetsGo)
                && !keeper.can_be_fenced
                && self.slots.values().flat_map(|slot| pages_of(slot.range)).any(has)
        })
    }

    /// Gives pages to all who are to have them.
    pub(super) fn grant(&mut self, pages: impl Iterator<Item = u64>) {
        let pages: Vec<u64> = pages.collect();
        (0..self.keepers.len()).for_each(|place| self.grant_to(place, &pages));
    }

    fn grant_to(&mut self, place: usize, pages: &[u64]) {
        let Some(Some(keeper)) = self.keepers.get(place) else { return };
        if keeper.standing != Standing::Told {
            return;
        }
        let spot = |page: u64| match keeper.terms.places {
            Spot::Object => Some(page),
            Spot::Guest => self.place_of(page),
        };
        let had = |page: u64| {
            let stays = self.errs(HostMistake::MemslotsMoveNothing);
            stays && keeper.maps.values().any(|&mapped| mapped == page)
        };
        let given: Vec<(u64, u64)> = pages
            .iter()
            .filter(|&&page| self.is_to_have(keeper, page) && !had(page))
            .filter_map(|&page| Some((spot(page)?, page)))
            .collect();
        if let Some(Some(keeper)) = self.keepers.get_mut(place) {
            keeper.maps.extend(given);
        }
    }
}
