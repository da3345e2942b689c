//! The helper that lets tests skip aloud, and what this host offers.

mod common;

use std::env;
use std::fs;
use std::process::Command;

use common::{Capability, Decision, decide, names};

fn lacking() -> Result<(), String> {
    Err("no such\tdevice\n".into())
}

#[test]
fn what_is_there_is_used() {
    assert_eq!(decide(Capability::Uffd, Ok(()), ""), Decision::Run);
    assert_eq!(decide(Capability::Uffd, Ok(()), "uffd,loom"), Decision::Run);
}

#[test]
fn what_is_lacking_is_skipped_in_one_line() {
    let why = "no such device".to_string();
    assert_eq!(decide(Capability::Kvm, lacking(), ""), Decision::Skip(why.clone()));
    assert_eq!(decide(Capability::Kvm, lacking(), "uffd,miri"), Decision::Skip(why));
}

#[test]
fn what_is_required_may_not_be_lacking() {
    for required in ["kvm", "uffd, kvm", "kvm,"] {
        let decision = decide(Capability::Kvm, lacking(), required);
        assert!(
            matches!(decision, Decision::Fail(why) if why.contains("kvm, but: no such device"))
        );
    }
}

#[test]
fn a_misspelt_name_is_an_error_even_where_nothing_is_lacking() {
    let decision = decide(Capability::Uffd, Ok(()), "uffd,ufd");
    assert!(matches!(decision, Decision::Fail(why) if why.contains("`ufd`")));
}

#[test]
fn every_capability_can_be_required() {
    let names: Vec<_> = Capability::ALL.iter().map(|capability| capability.name()).collect();
    assert_eq!(names, names::CAPABILITIES);
}

/// A test that maps views has to ask for userfaultfd, or it fails where it should be skipped.
#[test]
fn whoever_maps_views_asks_for_userfaultfd() {
    let sources = fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests")).unwrap();
    let mut nr_mapping = 0;
    for source in sources.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()) {
        let text = fs::read_to_string(&source).unwrap();
        let maps = text.contains(".map_view().unwrap()") && !source.ends_with("require.rs");
        nr_mapping += usize::from(maps);
        assert!(!maps || text.contains("Capability::Uffd"), "{}", source.display());
    }
    assert!(nr_mapping >= 4, "only {nr_mapping} files map views: is the text still the same?");
}

/// Each capability is looked for here, so that `GMEM_REQUIRE` means something for every one even
/// where no other test asks for it.
mod host {
    use super::*;

    #[test]
    fn uffd() {
        let _: bool = common::require(Capability::Uffd);
    }

    #[test]
    fn kvm() {
        let _: bool = common::require(Capability::Kvm);
    }

    #[test]
    fn hugetlb() {
        let _: bool = common::require(Capability::Hugetlb);
    }

    #[test]
    fn hugetlb1g() {
        let _: bool = common::require(Capability::Hugetlb1G);
    }

    #[test]
    fn numa() {
        let _: bool = common::require(Capability::Numa);
    }

    #[test]
    fn thp() {
        let _: bool = common::require(Capability::Thp);
    }

    #[test]
    fn uring() {
        let _: bool = common::require(Capability::Uring);
    }

    #[test]
    fn mlock() {
        let _: bool = common::require(Capability::Mlock);
    }
}

/// The whole way through the environment: this test runs itself as a child that lacks everything.
#[test]
fn the_environment_is_obeyed() {
    const ME: &str = "the_environment_is_obeyed";
    if env::var_os("GMEM_TEST_CHILD").is_some() {
        let found = common::settle(Capability::Kvm, lacking());
        println!("child found {found}");
        return;
    }

    let log = env::temp_dir().join(format!("gmem-skips-{}", std::process::id()));
    let child = |required: &str| {
        Command::new(env::current_exe().expect("this test is a file"))
            .args(["--exact", ME, "--nocapture"])
            .env("GMEM_TEST_CHILD", "1")
            .env("GMEM_REQUIRE", required)
            .env("GMEM_SKIP_LOG", &log)
            .output()
            .expect("this test can run itself")
    };

    let skipped = child("uffd");
    let said = String::from_utf8_lossy(&skipped.stdout).into_owned();
    assert!(skipped.status.success(), "{said}");
    assert!(said.contains("SKIP kvm: no such device") && said.contains("child found false"));
    let noted = fs::read_to_string(&log).expect("the child wrote a log");
    assert!(noted.contains("LACK\tkvm\tno such device\n"), "{noted}");
    assert!(noted.contains(&format!("SKIP\tkvm\tno such device\trequire::{ME}\n")), "{noted}");

    let failed = child("kvm");
    assert!(!failed.status.success());
    assert!(String::from_utf8_lossy(&failed.stderr).contains("GMEM_REQUIRE names kvm"));
    fs::remove_file(&log).expect("the log can be removed");
}
