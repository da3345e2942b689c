//! What steps name: memories, VMs and vCPUs, places in a memory, guests' addresses.

use std::fmt;
use std::str::FromStr;

use crate::words::number;

/// The granule, the host's and the guest's.
pub const PAGE_SIZE: u64 = 4096;

/// What a scenario calls a memory or a VM.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

impl Name {
    /// `m`.
    pub(crate) fn m() -> Self {
        Self("m".into())
    }

    /// `v`.
    pub(crate) fn v() -> Self {
        Self("v".into())
    }

    /// `w`.
    pub(crate) fn w() -> Self {
        Self("w".into())
    }
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let good = text.starts_with(|c: char| c.is_ascii_lowercase())
            && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        if good { Ok(Self(text.into())) } else { Err(format!("`{text}` is no name")) }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `v.1`: a vCPU of a VM.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VcpuName {
    /// Its VM.
    pub vm: Name,
    /// KVM's number for it.
    pub index: u8,
}

impl FromStr for VcpuName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (vm, index) = text.split_once('.').ok_or_else(|| format!("`{text}` is no vCPU"))?;
        let index = index.parse().map_err(|_| format!("`{index}` is no number of a vCPU"))?;
        Ok(Self { vm: vm.parse()?, index })
    }
}

impl fmt::Display for VcpuName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.vm, self.index)
    }
}

/// A guest's physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ipa(pub u64);

impl fmt::Display for Ipa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// `m[3]+0x10`: a byte of a memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Which memory.
    pub memory: Name,
    /// Its page.
    pub page: u64,
    /// Bytes from the start of that page.
    pub offset: u64,
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let no_place = || format!("`{text}` is no place, such as m[0] or m[0]+8");
        let (memory, rest) = text.split_once('[').ok_or_else(no_place)?;
        let (page, rest) = rest.split_once(']').ok_or_else(no_place)?;
        let offset = match rest {
            "" => 0,
            _ => number(rest.strip_prefix('+').ok_or_else(no_place)?)?,
        };
        if offset >= PAGE_SIZE {
            return Err(format!("{offset:#x} is not in a page"));
        }
        Ok(Self { memory: memory.parse()?, page: number(page)?, offset })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.memory, self.page)?;
        if self.offset == 0 { Ok(()) } else { write!(f, "+{:#x}", self.offset) }
    }
}

/// `m[0..4]`: pages of a memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pages {
    /// Which memory.
    pub memory: Name,
    /// The first page.
    pub first: u64,
    /// The page after the last.
    pub end: u64,
}

impl FromStr for Pages {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let read = || {
            let (memory, rest) = text.split_once('[')?;
            let (first, end) = rest.strip_suffix(']')?.split_once("..")?;
            Some((memory, first, end))
        };
        let (memory, first, end) =
            read().ok_or_else(|| format!("`{text}` are no pages, such as m[0..4]"))?;
        let pages = Self { memory: memory.parse()?, first: number(first)?, end: number(end)? };
        if pages.first >= pages.end {
            return Err(format!("`{text}` has no page"));
        }
        Ok(pages)
    }
}

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}..{}]", self.memory, self.first, self.end)
    }
}
