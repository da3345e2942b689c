//! Accounts: what a guest may take of a pool, however many objects it has.

use std::sync::Arc;

use super::pool::FolioPool;
use crate::addr::ByteSize;
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::MAX_PAGES;

/// A guest's account with a pool. Objects that are created [on it](crate::GuestMemfdBuilder::account) are charged
/// to it: what they reserve, or if they reserve nothing, what they take. Clones are handles to the same
/// account.
#[derive(Clone, Debug)]
pub struct Account(Arc<Key>);

/// Ends the account when the last handle and the last object on it are gone.
#[derive(Debug)]
struct Key {
    pool: FolioPool,
    index: usize,
}

impl Drop for Key {
    fn drop(&mut self) {
        self.pool.state().accounts.try_remove(self.index);
    }
}

/// What an account is charged at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AccountStat {
    /// The most that it may be charged; without a limit, the largest size there is.
    pub limit: ByteSize,
    /// What it is charged: promised or taken.
    pub charged: ByteSize,
    /// The most that it ever was charged.
    pub peak: ByteSize,
    /// What its objects' folios take.
    pub used: ByteSize,
}

impl FolioPool {
    /// Opens an account that may be charged so much; `None` for no limit. Ends the process if the host has no memory
    /// for some hundred bytes, as every `Arc` does.
    pub fn open_account(&self, limit: Option<ByteSize>) -> Account {
        let index = self.state().accounts.insert(Charge::new(limit));
        Account(Arc::new(Key { pool: self.clone(), index }))
    }
}

impl Account {
    pub(super) fn key(&self) -> usize {
        self.0.index
    }

    /// The counters.
    pub fn stat(&self) -> AccountStat {
        let state = self.0.pool.state();
        let Some(charge) = state.accounts.get(self.0.index) else {
            return AccountStat::default();
        };
        AccountStat {
            limit: ByteSize::from_pages(charge.limit_pages.unwrap_or(MAX_PAGES)),
            charged: ByteSize::from_pages(charge.charged_pages),
            peak: ByteSize::from_pages(charge.peak_pages),
            used: ByteSize::from_pages(charge.used_pages),
        }
    }

    /// Sets another limit; `None` for none. What is charged already stays, even if that is more: then
    /// nothing more is.
    pub fn set_limit(&self, limit: Option<ByteSize>) {
        if let Some(charge) = self.0.pool.state().accounts.get_mut(self.0.index) {
            charge.limit_pages = limit.map(ByteSize::whole_pages);
        }
    }

    /// The pool that it is an account with.
    pub fn pool(&self) -> &FolioPool {
        &self.0.pool
    }
}

/// An account's counters, in pages.
#[derive(Debug, Default)]
pub(super) struct Charge {
    pub(super) limit_pages: Option<u64>,
    charged_pages: u64,
    peak_pages: u64,
    used_pages: u64,
}

impl Charge {
    pub(super) fn new(limit: Option<ByteSize>) -> Self {
        Self { limit_pages: limit.map(ByteSize::whole_pages), ..Self::default() }
    }

    pub(super) fn charge(&mut self, op: Op, nr_pages: u64) -> Result<(), Error> {
        self.may_charge(op, nr_pages)?;
        self.charged_pages = self.charged_pages.saturating_add(nr_pages);
        self.peak_pages = self.peak_pages.max(self.charged_pages);
        Ok(())
    }

    /// Whether so much more could be charged.
    pub(super) fn may_charge(&self, op: Op, nr_pages: u64) -> Result<(), Error> {
        let after = self.charged_pages.saturating_add(nr_pages);
        match self.limit_pages.filter(|&limit| after > limit && nr_pages > 0) {
            None => Ok(()),
            Some(limit) => Err(Error::new(op, ErrorKind::LimitReached).because(format!(
                "{} bytes wanted, {} charged already, the account's limit is {}",
                ByteSize::from_pages(nr_pages).get(),
                ByteSize::from_pages(self.charged_pages).get(),
                ByteSize::from_pages(limit).get(),
            ))),
        }
    }

    pub(super) fn uncharge(&mut self, nr_pages: u64) {
        self.charged_pages = self.charged_pages.saturating_sub(nr_pages);
    }

    #[inline]
    pub(super) fn used(&mut self, nr_pages: u64) {
        self.used_pages += nr_pages;
    }

    #[inline]
    pub(super) fn unused(&mut self, nr_pages: u64) {
        self.used_pages = self.used_pages.saturating_sub(nr_pages);
    }
}
