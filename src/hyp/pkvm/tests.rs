
#[test]
fn a_pool_has_one_hypervisor_at_a_time() {
    let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(2)).unwrap();
    let first = Hypervisor::new(&pool).unwrap();
    assert_eq!(Hypervisor::new(&pool).unwrap_err().kind(), ErrorKind::Exists);
    let vm = first.create_vm().unwrap();
    drop(first);
    assert!(Hypervisor::new(&pool).is_err(), "its machine still lives");
    drop(vm);
    assert!(Hypervisor::new(&pool).is_ok());
}
