//! The wire format, frozen: a change here is a change that older guests and hosts cannot read.

use prost::Message;
use pyro_proto::resync::{Kind, mark};
use pyro_proto::{
    DialConnected, DialEnd, DialEvent, DialInput, DialRefused, EnvVar, ExecEvent, ExecExited, ExecInput,
    ExecStart, IdentifyRequest, SignalRequest, dial_event, dial_input, exec_event, exec_exited, exec_input,
};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_resync_mark() {
    assert_eq!(
        hex(&mark(Kind::Syn, &[0xab; 16])),
        "00ff537079726f2d726573796e63010a53abababababababababababababababab"
    );
}

#[test]
fn a_start_and_an_end() {
    let start = ExecStart {
        argv: vec!["git".into(), "--version".into()],
        env: vec![EnvVar { name: "A".into(), value: "b".into() }],
        cwd: "/workspace".into(),
        stdin: true,
        timeout_millis: 30_000,
        kill_after_millis: 2_000,
        ..ExecStart::default()
    };
    let start = ExecInput { kind: Some(exec_input::Kind::Start(start)) };
    assert_eq!(
        hex(&start.encode_to_vec()),
        "0a2d0a036769740a092d2d76657273696f6e1a060a0141120162220a2f776f726b7370616365280130b0ea0138d00f"
    );
    let exited = ExecExited {
        status: Some(exec_exited::Status::Code(7)),
        duration_micros: 1_000,
        ..ExecExited::default()
    };
    let exited = ExecEvent { kind: Some(exec_event::Kind::Exited(exited)) };
    assert_eq!(hex(&exited.encode_to_vec()), "2205080730e807");
}

#[test]
fn a_signal() {
    let signal = SignalRequest { pid: 300, signal: 15 };
    assert_eq!(hex(&signal.encode_to_vec()), "08ac02100f");
}

#[test]
fn what_generation_2_has_added() {
    let identity = IdentifyRequest {
        hostname: "a".to_owned(),
        authority: "PEM".into(),
        environment: vec![EnvVar { name: "A".into(), value: "b".into() }],
        ..IdentifyRequest::default()
    };
    assert_eq!(hex(&identity.encode_to_vec()), "1a01612a0350454d32060a0141120162");
    let input = |kind| hex(&DialInput { kind: Some(kind) }.encode_to_vec());
    assert_eq!(input(dial_input::Kind::Port(3000)), "08b817");
    assert_eq!(input(dial_input::Kind::Bytes("ab".into())), "12026162");
    assert_eq!(input(dial_input::Kind::End(DialEnd {})), "1a00");
    let event = |kind| hex(&DialEvent { kind: Some(kind) }.encode_to_vec());
    assert_eq!(event(dial_event::Kind::Connected(DialConnected {})), "0a00");
    assert_eq!(event(dial_event::Kind::Refused(DialRefused { message: "no".to_owned() })), "12040a026e6f");
    assert_eq!(event(dial_event::Kind::Bytes("ab".into())), "1a026162");
    assert_eq!(event(dial_event::Kind::End(DialEnd {})), "2200");
}

#[test]
fn what_generation_3_has_added() {
    let start = ExecStart { user: "a:b".into(), later_output: true, ..ExecStart::default() };
    assert_eq!(hex(&start.encode_to_vec()), "4203613a624801");
    let exited = ExecExited { output_open: true, ..ExecExited::default() };
    assert_eq!(hex(&exited.encode_to_vec()), "3801");
}

#[test]
fn a_length_beyond_the_bytes_is_an_error_not_an_allocation() {
    // Field 1, length-delimited, 2^60 bytes long.
    let mut bytes = vec![0x0a];
    prost::encoding::encode_varint(1 << 60, &mut bytes);
    ExecInput::decode(bytes.as_slice()).expect_err("refused");
}
