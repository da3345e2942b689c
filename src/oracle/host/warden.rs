//! A subscriber with a domain of the simulated IOMMU, which answers as it is told to.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use super::action::{Mood, Time};
use super::keepers::NO_FENCE;
use crate::error::Errno;
use crate::gmem::{HandOutRun, Subscriber};
use crate::hyp::iommu::Domain;
use crate::state::{Ack, Heard, Line};
use crate::sync::Arc;

#[derive(Debug)]
pub(super) struct Warden {
    pub(super) domain: Domain,
    time: Time,
    manners: Mutex<Manners>,
}

#[derive(Debug)]
struct Manners {
    mood: Mood,
    can_be_fenced: bool,
    /// What was asked and is still to be carried out, with all that came after it.
    late: Vec<Call>,
}

#[derive(Debug)]
enum Call {
    Revoke(Vec<HandOutRun>, Ack),
    Grant(Vec<HandOutRun>),
}

impl Warden {
    pub(super) fn new(domain: Domain, time: Time) -> Self {
        let manners = Manners { mood: Mood::LetsGo, can_be_fenced: true, late: Vec::new() };
        Self { domain, time, manners: Mutex::new(manners) }
    }

    fn manners(&self) -> MutexGuard<'_, Manners> {
        self.manners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn change(&self, mood: Mood, can_be_fenced: bool) {
        let mut manners = self.manners();
        (manners.mood, manners.can_be_fenced) = (mood, can_be_fenced);
    }

    /// Carries out what is late.
    ///
    /// # Errors
    /// If somebody still takes an answer.
    pub(super) fn catch_up(&self) -> Result<(), String> {
        let late = std::mem::take(&mut self.manners().late);
        let mut outcome = Ok(());
        for call in late {
            match call {
                Call::Grant(runs) => self.domain.grant(&runs),
                Call::Revoke(runs, ack) => {
                    // For the domain's own answer, which is nobody's.
                    let line = Arc::new(Line::new());
                    if let Some((_question, own)) = Line::ask(&line) {
                        self.domain.revoke(&runs, own);
                    }
                    if ack.let_go() != Heard::TooLate {
                        outcome = Err(String::from("an answer was heard that nobody waited for"));
                    }
                }
            }
        }
        outcome
    }

    /// It is gone, and never gets round to it.
    pub(super) fn forget(&self) {
        self.manners().late.clear();
    }
}

impl Subscriber for Warden {
    fn revoke(&self, runs: &[HandOutRun], ack: Ack) {
        // What was granted again since is too late to be heard of.
        let _ = self.catch_up();
        let mood = self.manners().mood;
        match mood {
            Mood::LetsGo => self.domain.revoke(runs, ack),
            Mood::Refuses => drop(ack.refuse(Errno::EBUSY)),
            Mood::Loses => drop(ack),
            Mood::Tarries if self.time == Time::Plenty => {
                let (domain, runs) = (self.domain.clone(), runs.to_vec());
                thread::spawn(move || domain.revoke(&runs, ack));
            }
            Mood::Tarries => self.manners().late.push(Call::Revoke(runs.to_vec(), ack)),
        }
    }

    fn grant(&self, runs: &[HandOutRun]) {
        let mut manners = self.manners();
        match manners.late.is_empty() {
            true => self.domain.grant(runs),
            false => manners.late.push(Call::Grant(runs.to_vec())),
        }
    }

    fn fence(&self) -> Result<(), Errno> {
        match self.manners().can_be_fenced {
            true => self.domain.fence(),
            false => Err(NO_FENCE),
        }
    }
}
