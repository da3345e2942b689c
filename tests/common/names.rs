//! The names that `GMEM_REQUIRE` may hold. `cargo xtask test` compiles this file as well, so that
//! there is one list.

/// The steps of `cargo xtask test`, in the order in which they run.
pub(crate) const STEPS: &[&str] = &[
    "fmt", "clippy", "doc", "tests", "doctests", "loom", "example", "features", "targets", "msrv",
    "miri", "tsan", "fuzz", "pkvm",
];

/// What a host may or may not offer to the tests.
pub(crate) const CAPABILITIES: &[&str] =
    &["uffd", "kvm", "hugetlb", "hugetlb1g", "thp", "numa", "mlock", "hwpoison", "uring"];

/// Splits a comma-separated list of names and refuses what nobody has heard of.
pub(crate) fn parse_required(list: &str) -> Result<Vec<&str>, String> {
    let names: Vec<_> = list.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    match names.iter().find(|name| !STEPS.contains(name) && !CAPABILITIES.contains(name)) {
        None => Ok(names),
        Some(unknown) => Err(format!(
            "GMEM_REQUIRE: `{unknown}` is neither a step ({}) nor a host capability ({})",
            STEPS.join(", "),
            CAPABILITIES.join(", ")
        )),
    }
}
