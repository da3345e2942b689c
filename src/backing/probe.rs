//! What the host could provide now.

use std::fmt;

use super::ArenaBacking;
use crate::addr::ByteSize;
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::NumaNode;
use crate::os::memory::{most_file_size, plain_available};
use crate::os::{hugetlb, memfd, numa, thp};

/// What the host offers to pools at one moment. Another process may take it in the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostOffer {
    offers: Vec<Offer>,
    nodes: Vec<NumaNode>,
}

/// What the host offers of one backing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    backing: ArenaBacking,
    available: Result<ByteSize, Error>,
}

impl HostOffer {
    /// One for each backing.
    pub fn offers(&self) -> &[Offer] {
        &self.offers
    }

    /// How much of a backing a pool could have now.
    ///
    /// # Errors
    /// As [`Offer::available`].
    pub fn available(&self, backing: ArenaBacking) -> Result<ByteSize, &Error> {
        let offer = self.offers.iter().find(|offer| offer.backing == backing);
        offer.map_or(Ok(ByteSize::default()), Offer::available)
    }

    /// The NUMA nodes that are online; none where the kernel knows of no nodes.
    pub fn nodes(&self) -> &[NumaNode] {
        &self.nodes
    }
}

impl Offer {
    /// What it is an offer of.
    pub fn backing(&self) -> ArenaBacking {
        self.backing
    }

    /// How much a pool could have now: of hugetlb what is free and promised to nobody, of anything else
    /// what the host and the control groups have left, but no more than a file may hold. Never zero.
    ///
    /// # Errors
    /// What the creation of a pool would say: [`ErrorKind::MissingCapability`],
    /// [`ErrorKind::Exhausted`] or [`ErrorKind::Os`]; [`ErrorKind::Unsupported`] where nobody can tell.
    pub fn available(&self) -> Result<ByteSize, &Error> {
        self.available.as_ref().copied()
    }
}

impl fmt::Display for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.available {
            Ok(size) => write!(f, "{}: {} MiB", self.backing, size.get() >> 20),
            Err(why) => write!(f, "{}: none: {why}", self.backing),
        }
    }
}

impl fmt::Display for HostOffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.offers.iter().try_for_each(|offer| writeln!(f, "{offer}"))?;
        let nodes: Vec<_> = self.nodes.iter().map(NumaNode::to_string).collect();
        write!(f, "NUMA nodes: {}", nodes.join(", "))
    }
}

/// Asks the host.
pub(crate) fn probe() -> HostOffer {
    let offer = |backing| Offer { backing, available: available(backing) };
    HostOffer { offers: ArenaBacking::ALL.map(offer).into(), nodes: numa::online() }
}

fn available(backing: ArenaBacking) -> Result<ByteSize, Error> {
    let Some(kind) = backing.pages() else { return some(plain_available()?, "no memory is left") };
    if backing == ArenaBacking::MemfdThp {
        thp::require_shmem()?;
    }
    // Whether there are such files at all.
    memfd::create_arena(kind, ByteSize::default())?;
    let free = if backing.is_hugetlb() {
        hugetlb::unclaimed(backing.view_granule())?
    } else {
        plain_available()?
    };
    some(most_file_size().map_or(free, |most| free.min(most)), kind.too_few())
}

fn some(size: ByteSize, lacking: &'static str) -> Result<ByteSize, Error> {
    if size == ByteSize::default() {
        return Err(Error::new(Op::CreatePool, ErrorKind::Exhausted).because(lacking));
    }
    Ok(size)
}
