//! Real namespaces, looked at from inside.

use super::*;

#[test]
fn a_namespace_is_made_and_leaves_nothing() {
    for attach in [Attach::Descriptor, Attach::Name] {
        let began = std::time::Instant::now();
        let made = Namespace::make(attach, Path::new("/dev/net/tun")).expect("made");
        println!("{attach:?}: {:?}", began.elapsed());
        assert_eq!(made.tap.is_some(), attach == Attach::Descriptor);
    }
}
