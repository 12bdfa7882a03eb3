//! Children of a program of which another part waits for any child, as an init or an old signal handler does.

#![expect(unsafe_code, reason = "waiting for any child")]

use std::path::Path;
use std::time::Duration;

use pyro_process::{Spawn, output};

#[test]
fn a_child_that_another_part_of_the_program_has_reaped_is_one_that_has_ended() {
    std::thread::spawn(|| {
        loop {
            // SAFETY: a null pointer asks for no status.
            if unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) } < 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    let error = Spawn::new("/nonexistent/program", Path::new("/")).spawn().expect_err("no such program");
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    for _ in 0..50 {
        let mut spawn = Spawn::new("echo", Path::new("/"));
        spawn.arg("words");
        let output = output(spawn).expect("echo runs");
        assert_eq!(output.stdout, b"words\n");
        // Which of the two was quicker decides.
        assert!(output.status.status().is_none_or(|status| status.success()), "{}", output.status);
    }
    Spawn::new("true", Path::new("/")).spawn_detached().expect("started");
}
