//! Error numbers by their names.

use std::fmt;
use std::str::FromStr;

/// An error number of Linux, positive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Errno(pub i32);

/// As on arm64 and x86-64.
const NAMES: &[(&str, i32)] = &[
    ("EPERM", 1),
    ("ENOENT", 2),
    ("ESRCH", 3),
    ("EINTR", 4),
    ("EIO", 5),
    ("ENXIO", 6),
    ("E2BIG", 7),
    ("ENOEXEC", 8),
    ("EBADF", 9),
    ("ECHILD", 10),
    ("EAGAIN", 11),
    ("ENOMEM", 12),
    ("EACCES", 13),
    ("EFAULT", 14),
    ("EBUSY", 16),
    ("EEXIST", 17),
    ("ENODEV", 19),
    ("EINVAL", 22),
    ("EMFILE", 24),
    ("ENOTTY", 25),
    ("EFBIG", 27),
    ("ENOSPC", 28),
    ("EPIPE", 32),
    ("ERANGE", 34),
    ("ENOSYS", 38),
    ("EOVERFLOW", 75),
    ("EOPNOTSUPP", 95),
    ("EHWPOISON", 133),
];

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.iter().find(|(_, number)| *number == self.0) {
            Some((name, _)) => f.write_str(name),
            None => write!(f, "E{}", self.0),
        }
    }
}

impl FromStr for Errno {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = NAMES.iter().find(|(name, _)| *name == text).map(|&(_, number)| Self(number));
        named
            .or_else(|| {
                let number = text.strip_prefix('E')?.parse().ok().map(Self)?;
                // One spelling for each: text is what is compared.
                (number.to_string() == text).then_some(number)
            })
            .ok_or_else(|| format!("`{text}` is no error number"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_has_one_spelling() {
        for number in 1..200 {
            let text = Errno(number).to_string();
            assert_eq!(text.parse(), Ok(Errno(number)), "{text}");
        }
        for bad in ["E", "E1", "EFOO", "14", "e14"] {
            assert!(bad.parse::<Errno>().is_err(), "{bad} was read");
        }
    }
}
