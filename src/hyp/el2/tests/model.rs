//! What EL2 should answer and what becomes of it, told again from the list of transitions: frames and guests' pages in
//! plain maps, without tables, records, or a line of the code that is judged.

use std::collections::BTreeMap;

use super::*;

pub(super) const BLOCK: u64 = 512;

/// Whose a frame is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Own {
    #[default]
    Host,
    ShownToHyp,
    ShownToFfa,
    Ffa,
    /// Lent to so many pages of guests that are not protected.
    Lent(u32),
    Guest(usize, u64),
    GuestShows(usize, u64),
    /// It went with a guest: alone, shown, or lent.
    Lost(State, u32),
}

/// What a guest has at an address: so many frames from one on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) pfn: u64,
    pub(super) nr: u64,
    pub(super) shows: bool,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Vm {
    pub(super) protected: bool,
    pub(super) dying: bool,
    pub(super) pieces: BTreeMap<u64, Piece>,
    pub(super) poison: BTreeMap<u64, u64>,
}

fn covers<T>(map: &BTreeMap<u64, T>, gfn: u64, nr_of: impl Fn(&T) -> u64) -> Option<u64> {
    let (&start, found) = map.range(..=gfn).next_back()?;
    (gfn - start < nr_of(found)).then_some(start)
}

impl Vm {
    /// The piece around an address, and where it begins.
    pub(super) fn piece(&self, gfn: u64) -> Option<(u64, Piece)> {
        let start = covers(&self.pieces, gfn, |piece| piece.nr)?;
        Some((start, self.pieces[&start]))
    }

    pub(super) fn is_poisoned(&self, gfn: u64) -> bool {
        covers(&self.poison, gfn, |&nr| nr).is_some()
    }

    fn is_vacant(&self, gfn: u64, nr: u64) -> bool {
        let inside = |gfn| self.piece(gfn).is_none() && !self.is_poisoned(gfn);
        let begins = self.pieces.range(gfn..gfn + nr).next().is_none();
        inside(gfn) && begins && self.poison.range(gfn..gfn + nr).next().is_none()
    }

    pub(super) fn state(&self, gfn: u64) -> State {
        match self.piece(gfn) {
            _ if self.is_poisoned(gfn) => State::Poison,
            None => State::NoPage,
            Some(_) if !self.protected => State::SharedBorrowed,
            Some((_, piece)) if piece.shows => State::SharedOwned,
            Some(_) => State::Owned,
        }
    }
}

#[derive(Debug)]
pub(super) struct Model {
    pub(super) profile: Profile,
    /// Those that are not the host's alone.
    pub(super) frames: BTreeMap<u64, Own>,
    pub(super) vms: Vec<Vm>,
    pub(super) dma: BTreeMap<u64, u16>,
}

pub(super) type Wanted = Result<(), Errno>;

impl Model {
    pub(super) fn own(&self, pfn: u64) -> Own {
        self.frames.get(&pfn).cloned().unwrap_or_default()
    }

    pub(super) fn set(&mut self, pfn: u64, nr: u64, own: impl Fn(u64) -> Own) {
        for nth in 0..nr {
            match own(nth) {
                Own::Host => self.frames.remove(&(pfn + nth)),
                own => self.frames.insert(pfn + nth, own),
            };
        }
    }

    fn is_host(&self, pfn: u64, nr: u64) -> bool {
        self.frames.range(pfn..pfn + nr).next().is_none()
    }

    /// Whether the host may hand frames to anybody.
    fn host_has(&self, pfn: u64, nr: u64, device: Errno) -> Wanted {
        match pfn {
            DEVICE => Err(device),
            NO_MAP if nr > 4 => Err(Errno::EINVAL),
            NO_MAP | CARVEOUT => Err(Errno::EPERM),
            _ if !self.is_host(pfn, nr) => Err(Errno::EPERM),
            _ if self.dma.range(pfn..pfn + nr).next().is_some() => Err(Errno::EINVAL),
            _ => Ok(()),
        }
    }

    fn device_errno(&self) -> Errno {
        if self.profile.is_android() { Errno::EINVAL } else { Errno::EPERM }
    }

    pub(super) fn shown_to_el2(&self, pfn: u64) -> Wanted {
        self.host_has(pfn, 1, Errno::EPERM)
    }

    pub(super) fn given_away(&self, pfn: u64, nr: u64) -> Wanted {
        self.host_has(pfn, nr, self.device_errno())
    }

    pub(super) fn donated(&self, vm: Option<usize>, pfn: u64, gfn: u64, nr: u64) -> Wanted {
        let vm = vm.map(|vm| &self.vms[vm]).filter(|vm| vm.protected).ok_or(Errno::EINVAL)?;
        if (pfn | gfn) % nr != 0 {
            return Err(Errno::EINVAL);
        }
        self.given_away(pfn, nr)?;
        if vm.is_vacant(gfn, nr) { Ok(()) } else { Err(Errno::EPERM) }
    }

    pub(super) fn lent(&self, vm: Option<usize>, pfn: u64, gfn: u64, nr: u64) -> Wanted {
        let vm = vm.map(|vm| &self.vms[vm]).filter(|vm| !vm.protected).ok_or(Errno::EINVAL)?;
        let lendable = |pfn| match self.own(pfn) {
            Own::Host | Own::Lent(_) => true,
            Own::Lost(State::SharedOwned, nr) => nr > 0,
            _ => false,
        };
        match pfn {
            _ if (pfn | gfn) % nr != 0 => Err(Errno::EINVAL),
            NO_MAP if nr > 4 => Err(Errno::EINVAL),
            DEVICE | NO_MAP | CARVEOUT => Err(Errno::EPERM),
            _ if !vm.is_vacant(gfn, nr) => Err(Errno::EPERM),
            _ if (pfn..pfn + nr).all(lendable) => Ok(()),
            _ => Err(Errno::EPERM),
        }
    }

    pub(super) fn unlent(&self, vm: usize, gfn: u64, nr: u64) -> Wanted {
        let vm = &self.vms[vm];
        if vm.protected || gfn % nr != 0 {
            return Err(Errno::EINVAL);
        }
        match vm.piece(gfn) {
            None => Err(Errno::ENOENT),
            Some((_, piece)) if piece.nr != nr => Err(Errno::E2BIG),
            Some(_) => Ok(()),
        }
    }

    /// A single page of a protected guest that is to be in one state.
    pub(super) fn page_that(&self, vm: usize, gfn: u64, shows: bool) -> Wanted {
        let vm = &self.vms[vm];
        match vm.piece(gfn) {
            _ if vm.is_poisoned(gfn) => Err(Errno::EHWPOISON),
            None => Err(Errno::ENOENT),
            Some((_, piece)) if piece.nr > 1 => Err(Errno::E2BIG),
            Some((_, piece)) if piece.shows != shows => Err(Errno::EPERM),
            Some(_) => Ok(()),
        }
    }

    pub(super) fn split(&self, vm: Option<usize>, gfn: u64) -> Wanted {
        if !self.profile.splits() {
            return Err(Errno::ENOSYS);
        }
        let vm = vm.map(|vm| &self.vms[vm]).filter(|vm| vm.protected).ok_or(Errno::EINVAL)?;
        match vm.piece(gfn) {
            _ if gfn % BLOCK != 0 => Err(Errno::EINVAL),
            _ if vm.is_poisoned(gfn) => Err(Errno::EHWPOISON),
            None => Err(Errno::ENOENT),
            Some((_, piece)) if piece.nr == 1 => Err(Errno::EINVAL),
            Some(_) => Ok(()),
        }
    }

    pub(super) fn forced(&self, pfn: u64) -> Wanted {
        match (pfn, self.own(pfn)) {
            (DEVICE, _) => Err(Errno::EFAULT),
            (CARVEOUT, _) | (_, Own::Ffa) => Err(Errno::EPERM),
            (_, Own::Guest(..)) if pfn != NO_MAP => Ok(()),
            // Whose handle is used again has another owner's.
            (_, Own::Lost(State::NoPage, _)) => Err(Errno::EPERM),
            _ => Err(Errno::EAGAIN),
        }
    }

    pub(super) fn reclaimed(&self, vm: usize, gfn: u64) -> Wanted {
        let vm = &self.vms[vm];
        let whole = |start, nr| nr == 1 || self.profile.splits() && start == gfn;
        match vm.piece(gfn) {
            _ if !vm.dying => Err(Errno::EINVAL),
            _ if vm.is_poisoned(gfn) => Ok(()),
            None => Err(Errno::ENOENT),
            Some((start, piece)) if !whole(start, piece.nr) => Err(Errno::E2BIG),
            Some(_) if !vm.protected => Err(Errno::EPERM),
            Some(_) => Ok(()),
        }
    }

    /// A guest gets what it was given or lent.
    pub(super) fn gain(&mut self, vm: usize, pfn: u64, gfn: u64, nr: u64) {
        self.vms[vm].pieces.insert(gfn, Piece { pfn, nr, shows: false });
        for nth in 0..nr {
            let own = match (self.vms[vm].protected, self.own(pfn + nth)) {
                (true, _) => Own::Guest(vm, gfn + nth),
                (false, Own::Lent(nr)) => Own::Lent(nr + 1),
                (false, Own::Lost(state, nr)) => Own::Lost(state, nr + 1),
                (false, _) => Own::Lent(1),
            };
            self.frames.insert(pfn + nth, own);
        }
    }

    /// A guest loses the piece at an address, and the host has it again.
    pub(super) fn lose(&mut self, vm: usize, gfn: u64) -> Option<Piece> {
        let piece = self.vms[vm].pieces.remove(&gfn)?;
        for pfn in piece.pfn..piece.pfn + piece.nr {
            match self.own(pfn) {
                Own::Lent(nr @ 2..) => drop(self.frames.insert(pfn, Own::Lent(nr - 1))),
                Own::Lost(state, nr) => drop(self.frames.insert(pfn, Own::Lost(state, nr - 1))),
                _ => drop(self.frames.remove(&pfn)),
            }
        }
        Some(piece)
    }

    /// So many pages from an address on are shown, or hidden again.
    pub(super) fn show(&mut self, vm: usize, gfn: u64, nr: u64, shows: bool) {
        let starts: Vec<_> = self.vms[vm].pieces.range(gfn..gfn + nr).map(|(&at, _)| at).collect();
        for start in starts {
            let Some(piece) = self.vms[vm].pieces.get_mut(&start) else { continue };
            piece.shows = shows;
            let Piece { pfn, nr, .. } = *piece;
            self.set(pfn, nr, |nth| match shows {
                true => Own::GuestShows(vm, start + nth),
                false => Own::Guest(vm, start + nth),
            });
        }
    }

    pub(super) fn cut(&mut self, vm: usize, gfn: u64) {
        let Some(piece) = self.vms[vm].pieces.remove(&gfn) else { return };
        for nth in 0..piece.nr {
            let page = Piece { pfn: piece.pfn + nth, nr: 1, ..piece };
            self.vms[vm].pieces.insert(gfn + nth, page);
        }
    }

    /// What the piece around a frame was is destroyed.
    pub(super) fn destroy(&mut self, pfn: u64) {
        let Own::Guest(vm, gfn) = self.own(pfn) else { return };
        let Some((start, _)) = self.vms[vm].piece(gfn) else { return };
        if let Some(piece) = self.lose(vm, start) {
            self.vms[vm].poison.insert(start, piece.nr);
        }
    }

    /// A guest is gone, with all that nobody asked back; another one comes.
    pub(super) fn end(&mut self, vm: usize) {
        let gone = std::mem::take(&mut self.vms[vm]);
        for piece in gone.pieces.values() {
            for pfn in piece.pfn..piece.pfn + piece.nr {
                let own = match self.own(pfn) {
                    Own::Guest(..) => Own::Lost(State::NoPage, 0),
                    Own::GuestShows(..) => Own::Lost(State::SharedBorrowed, 0),
                    Own::Lent(nr) => Own::Lost(State::SharedOwned, nr),
                    other => other,
                };
                self.frames.insert(pfn, own);
            }
        }
        self.vms[vm].protected = gone.protected;
    }

    /// What the record of a frame should be: host, EL2, guests that it is lent to.
    pub(super) fn record(&self, pfn: u64) -> (State, State, u32) {
        match self.own(pfn) {
            Own::Host => (State::Owned, State::NoPage, 0),
            Own::ShownToHyp => (State::SharedOwned, State::SharedBorrowed, 0),
            Own::ShownToFfa => (State::SharedOwned, State::NoPage, 0),
            Own::Ffa | Own::Guest(..) => (State::NoPage, State::NoPage, 0),
            Own::Lent(nr) => (State::SharedOwned, State::NoPage, nr),
            Own::GuestShows(..) => (State::SharedBorrowed, State::NoPage, 0),
            Own::Lost(state, nr) => (state, State::NoPage, nr),
        }
    }
}
