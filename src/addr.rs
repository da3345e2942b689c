//! Addresses: one type for each address space, in pages or in bytes, with no way to mix them.
//!
//! | space | page number | byte address |
//! |---|---|---|
//! | the object (what [`GuestMemfd`](crate::GuestMemfd) holds) | [`Pgoff`] | [`Offset`] |
//! | guest physical, before stage 2 | [`Gfn`] | [`Ipa`] |
//! | the pool's arena, behind stage 2 | [`Pfn`] | [`Pa`] |
//! | the VMM's own virtual memory | | [`Hva`] |
//!
//! Numbers enter through `new` and leave through `get`. Operators are left out on purpose: an
//! addition may overflow, and only the checked forms say so.

use std::fmt;

use crate::geometry::PAGE_SHIFT;

mod sealed {
    pub trait Sealed {}
}

/// A page number in one of the address spaces; implemented by [`Pgoff`], [`Gfn`] and [`Pfn`].
pub trait PageNumber: sealed::Sealed + Copy + Ord + fmt::Debug {
    /// Wraps a page number. Nothing is checked: ranges are, at birth.
    fn from_raw(raw: u64) -> Self;
    /// The number itself.
    fn to_raw(self) -> u64;
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(u64);

        impl $name {
            /// Wraps the number.
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The number itself.
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

macro_rules! page_number {
    ($(#[$doc:meta])* $name:ident => $bytes:ident, $to_bytes:ident) => {
        number!($(#[$doc])* $name);

        impl $name {
            /// The page that lies `pages` further on; `None` where that does not exist.
            pub const fn checked_add(self, pages: u64) -> Option<Self> {
                match self.0.checked_add(pages) {
                    Some(raw) => Some(Self(raw)),
                    None => None,
                }
            }

            /// The address of the page's first byte. A page number too large to have one
            /// saturates, and then lies outside every range.
            pub const fn $to_bytes(self) -> $bytes {
                $bytes::new(self.0.saturating_mul(1 << PAGE_SHIFT))
            }
        }

        impl sealed::Sealed for $name {}

        impl PageNumber for $name {
            fn from_raw(raw: u64) -> Self {
                Self(raw)
            }

            fn to_raw(self) -> u64 {
                self.0
            }
        }
    };
}

macro_rules! byte_address {
    ($(#[$doc:meta])* $name:ident => $page:ident, $to_page:ident) => {
        number!($(#[$doc])* $name);

        impl $name {
            /// The address `size` further on; `None` on overflow.
            pub const fn checked_add(self, size: ByteSize) -> Option<Self> {
                match self.0.checked_add(size.0) {
                    Some(raw) => Some(Self(raw)),
                    None => None,
                }
            }

            /// The page that holds this byte.
            pub const fn $to_page(self) -> $page {
                $page::new(self.0 >> PAGE_SHIFT)
            }

            /// Where in its page this byte lies.
            pub const fn in_page(self) -> ByteSize {
                ByteSize(self.0 & ((1 << PAGE_SHIFT) - 1))
            }

            /// Whether this is the first byte of a page.
            pub const fn is_page_aligned(self) -> bool {
                self.in_page().0 == 0
            }
        }
    };
}

page_number! {
    /// A page of the object, counted from its start.
    Pgoff => Offset, offset
}
page_number! {
    /// A guest frame: a page of guest-physical memory.
    Gfn => Ipa, ipa
}
page_number! {
    /// A physical frame: a page of the pool's arena.
    Pfn => Pa, pa
}
byte_address! {
    /// A byte of the object, counted from its start.
    Offset => Pgoff, pgoff
}
byte_address! {
    /// An intermediate physical address: what the guest believes to be physical.
    Ipa => Gfn, gfn
}
byte_address! {
    /// A byte of the pool's arena.
    Pa => Pfn, pfn
}

/// A host virtual address, in the VMM's own address space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hva(usize);

impl Hva {
    /// Wraps an address.
    pub const fn new(raw: usize) -> Self {
        Self(raw)
    }

    /// The address as a number.
    pub const fn get(self) -> usize {
        self.0
    }

    /// The address `size` further on; `None` on overflow.
    pub fn checked_add(self, size: ByteSize) -> Option<Self> {
        let len = usize::try_from(size.0).ok()?;
        self.0.checked_add(len).map(Self)
    }
}

impl fmt::Debug for Hva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hva({:#x})", self.0)
    }
}

impl fmt::Display for Hva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Which way an access to memory goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// A load.
    Read,
    /// A store.
    Write,
}

number! {
    /// A number of bytes.
    ByteSize
}

impl ByteSize {
    /// So many bytes.
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// So many KiB, saturating.
    pub const fn from_kib(kib: u64) -> Self {
        Self(kib.saturating_mul(1 << 10))
    }

    /// So many MiB, saturating.
    pub const fn from_mib(mib: u64) -> Self {
        Self(mib.saturating_mul(1 << 20))
    }

    /// So many pages of 4 KiB, saturating.
    pub const fn from_pages(pages: u64) -> Self {
        Self(pages.saturating_mul(1 << PAGE_SHIFT))
    }

    /// The length of a buffer.
    pub const fn of(buf: &[u8]) -> Self {
        Self(buf.len() as u64)
    }

    /// Whole pages, rounded down.
    pub const fn whole_pages(self) -> u64 {
        self.0 >> PAGE_SHIFT
    }

    /// Whether this is a whole number of pages.
    pub const fn is_page_aligned(self) -> bool {
        self.0 & ((1 << PAGE_SHIFT) - 1) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_and_bytes_convert_within_one_space_only() {
        assert_eq!(Gfn::new(3).ipa(), Ipa::new(0x3000));
        assert_eq!(Ipa::new(0x3fff).gfn(), Gfn::new(3));
        assert_eq!(Ipa::new(0x3fff).in_page(), ByteSize::from_bytes(0xfff));
        assert_eq!(Pfn::new(u64::MAX).pa(), Pa::new(u64::MAX));
    }

    #[test]
    fn nothing_wraps() {
        assert_eq!(Pgoff::new(u64::MAX).checked_add(1), None);
        assert_eq!(Offset::new(u64::MAX).checked_add(ByteSize::from_bytes(1)), None);
        assert_eq!(Hva::new(usize::MAX).checked_add(ByteSize::from_bytes(1)), None);
        assert_eq!(ByteSize::from_mib(u64::MAX), ByteSize::from_bytes(u64::MAX));
    }

    #[test]
    fn debug_names_the_space() {
        assert_eq!(format!("{:?} {}", Gfn::new(16), Gfn::new(16)), "Gfn(0x10) 0x10");
    }
}
