//! A client of Firecracker's HTTP API on its unix socket: the few calls that a machine's life takes.
//!
//! One connection is kept, and calls go over it in turn. The peer is not trusted: an answer costs a bounded amount of
//! memory.

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use crate::error::ControlError;

/// The longest answer that is read, in bytes.
const ANSWER_BYTES_MAX: usize = 64 << 10;
/// The longest refusal that is passed on.
const FAULT_CHARS_MAX: usize = 500;

/// A call: where it goes, and what its body is.
pub(super) trait Call: Serialize {
    const METHOD: Method = Method::PUT;
    /// The path's first part, as the API's description has it.
    const NAME: &'static str;
    /// The whole path.
    fn path(&self) -> String {
        Self::NAME.to_owned()
    }
}

/// What the guest boots.
#[derive(Debug, Serialize)]
pub(super) struct BootSource {
    pub(super) kernel_image_path: &'static str,
    pub(super) initrd_path: &'static str,
    pub(super) boot_args: String,
}

impl Call for BootSource {
    const NAME: &'static str = "/boot-source";
}

/// The size of the machine.
#[derive(Debug, Serialize)]
pub(super) struct MachineConfiguration {
    pub(super) vcpu_count: u8,
    pub(super) mem_size_mib: u32,
    pub(super) smt: bool,
    pub(super) track_dirty_pages: bool,
}

impl Call for MachineConfiguration {
    const NAME: &'static str = "/machine-config";
}

/// A disk.
#[derive(Debug, Serialize)]
pub(super) struct Drive {
    pub(super) drive_id: &'static str,
    pub(super) path_on_host: &'static str,
    pub(super) is_root_device: bool,
    pub(super) is_read_only: bool,
    pub(super) cache_type: &'static str,
    pub(super) io_engine: &'static str,
}

impl Call for Drive {
    const NAME: &'static str = "/drives";
    fn path(&self) -> String {
        format!("{}/{}", Self::NAME, self.drive_id)
    }
}

/// The channel to the guest.
#[derive(Debug, Serialize)]
pub(super) struct Vsock {
    pub(super) guest_cid: u32,
    pub(super) uds_path: &'static str,
}

impl Call for Vsock {
    const NAME: &'static str = "/vsock";
}

/// A network device, on a tap of the VMM's namespace.
#[derive(Debug, Serialize)]
pub(super) struct NetworkInterface {
    pub(super) iface_id: &'static str,
    pub(super) host_dev_name: &'static str,
    pub(super) guest_mac: String,
}

impl Call for NetworkInterface {
    const NAME: &'static str = "/network-interfaces";
    fn path(&self) -> String {
        format!("{}/{}", Self::NAME, self.iface_id)
    }
}

/// Something to do.
#[derive(Debug, Serialize)]
pub(super) struct InstanceActionInfo {
    pub(super) action_type: &'static str,
}

impl Call for InstanceActionInfo {
    const NAME: &'static str = "/actions";
}

/// Whether the processors run.
#[derive(Debug, Serialize)]
pub(super) struct Vm {
    pub(super) state: &'static str,
}

impl Call for Vm {
    const METHOD: Method = Method::PATCH;
    const NAME: &'static str = "/vm";
}

/// Where to save a paused machine.
#[derive(Debug, Serialize)]
pub(super) struct SnapshotCreateParams {
    pub(super) snapshot_type: &'static str,
    pub(super) snapshot_path: &'static str,
    pub(super) mem_file_path: &'static str,
}

impl Call for SnapshotCreateParams {
    const NAME: &'static str = "/snapshot/create";
}

/// What to go on from.
#[derive(Debug, Serialize)]
pub(super) struct SnapshotLoadParams {
    pub(super) snapshot_path: &'static str,
    pub(super) mem_backend: MemoryBackend,
    pub(super) resume_vm: bool,
}

/// Where the memory of a saved machine is.
#[derive(Debug, Serialize)]
pub(super) struct MemoryBackend {
    pub(super) backend_type: &'static str,
    pub(super) backend_path: &'static str,
}

impl Call for SnapshotLoadParams {
    const NAME: &'static str = "/snapshot/load";
}

/// How Firecracker says that it will not.
#[derive(Debug, Deserialize)]
struct Fault {
    fault_message: String,
}

/// The connection to one Firecracker.
#[derive(Debug)]
pub(super) struct Api {
    sender: Mutex<SendRequest<Full<Bytes>>>,
}

impl Api {
    /// Speaks HTTP over a connected stream.
    pub(super) async fn over(stream: UnixStream) -> Result<Self, ControlError> {
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // It ends with the connection, which ends with the sender or with Firecracker.
        drop(tokio::spawn(connection));
        Ok(Self { sender: Mutex::new(sender) })
    }

    /// Makes a call and waits for its success, which has no body.
    pub(super) async fn call<C: Call>(&self, call: &C) -> Result<(), ControlError> {
        let body = serde_json::to_vec(call)
            .map_err(|_| ControlError::Protocol { what: "a call that is no JSON" })?;
        let request = Request::builder()
            .method(C::METHOD)
            .uri(call.path())
            .header(HOST, "localhost")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::from(body))
            .map_err(|_| ControlError::Protocol { what: "a call that is no request" })?;
        let mut sender = self.sender.lock().await;
        sender.ready().await.map_err(broken)?;
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|_| ControlError::Protocol { what: "an answer that is too long or cut" })?;
        if status == StatusCode::NO_CONTENT || status == StatusCode::OK {
            return Ok(());
        }
        let fault: Fault = serde_json::from_slice(&body.to_bytes())
            .map_err(|_| ControlError::Protocol { what: "a refusal of another shape" })?;
        let words = fault.fault_message.chars().map(|c| if c.is_control() { ' ' } else { c });
        Err(ControlError::Refused { command: C::NAME, description: words.take(FAULT_CHARS_MAX).collect() })
    }
}

fn broken(error: hyper::Error) -> ControlError {
    if error.is_closed() || error.is_incomplete_message() || error.is_canceled() {
        return ControlError::Ended;
    }
    ControlError::Io(std::io::Error::other(error))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Calls and fields of the published description of the API, of the version that is tested.
    const DESCRIPTION: &str = include_str!("../../tests/firecracker_api.json");

    /// Checks that a call is described, that it sends no field that is not, with a value of the described kind, and all
    /// that must be there.
    fn check<C: Call>(call: &C, suffix: &str) {
        let description: Value = serde_json::from_str(DESCRIPTION).expect("JSON");
        let name = format!("{} {}{suffix}", C::METHOD, C::NAME);
        let body = &description["calls"][&name]["body"];
        let body = body.as_str().unwrap_or_else(|| panic!("{name} is not described"));
        check_object(&description["objects"], body, &serde_json::to_value(call).expect("JSON"));
    }

    fn check_object(objects: &Value, name: &str, value: &Value) {
        let object = &objects[name];
        let sent = value.as_object().expect("an object");
        for required in object["required"].as_array().into_iter().flatten() {
            let field = required.as_str().expect("a name");
            assert!(sent.contains_key(field), "{name} needs {field}");
        }
        for (field, value) in sent {
            let kind = &object["fields"][field];
            let is_right = match kind {
                Value::String(kind) => match kind.as_str() {
                    "string" => value.is_string(),
                    "integer" => value.is_u64(),
                    "boolean" => value.is_boolean(),
                    _ => false,
                },
                Value::Object(kind) if kind.contains_key("enum") => {
                    kind["enum"].as_array().expect("a list").contains(value)
                }
                Value::Object(kind) if kind.contains_key("ref") => {
                    check_object(objects, kind["ref"].as_str().expect("a name"), value);
                    true
                }
                _ => false,
            };
            assert!(is_right, "{name}.{field} is {value}, and is described as {kind}");
        }
    }

    #[test]
    fn what_is_sent_is_what_the_api_describes() {
        let text = || "text".to_owned();
        check(&BootSource { kernel_image_path: "k", initrd_path: "i", boot_args: text() }, "");
        let size =
            MachineConfiguration { vcpu_count: 1, mem_size_mib: 128, smt: false, track_dirty_pages: false };
        check(&size, "");
        let drive = |cache_type| Drive {
            drive_id: "d",
            path_on_host: "d",
            is_root_device: false,
            is_read_only: true,
            cache_type,
            io_engine: "Sync",
        };
        check(&drive("Unsafe"), "/{drive_id}");
        check(&drive("Writeback"), "/{drive_id}");
        assert_eq!(drive("Unsafe").path(), "/drives/d");
        check(&Vsock { guest_cid: 3, uds_path: "v" }, "");
        let nic = NetworkInterface { iface_id: "n", host_dev_name: "tap0", guest_mac: text() };
        check(&nic, "/{iface_id}");
        check(&InstanceActionInfo { action_type: "InstanceStart" }, "");
        check(&Vm { state: "Paused" }, "");
        check(&Vm { state: "Resumed" }, "");
        let create = SnapshotCreateParams { snapshot_type: "Full", snapshot_path: "s", mem_file_path: "m" };
        check(&create, "");
        let mem_backend = MemoryBackend { backend_type: "File", backend_path: "m" };
        check(&SnapshotLoadParams { snapshot_path: "s", mem_backend, resume_vm: true }, "");
    }

    #[test]
    fn the_description_is_of_the_tested_version() {
        let description: Value = serde_json::from_str(DESCRIPTION).expect("JSON");
        assert_eq!(description["version"], json!(crate::source::VERSION));
        assert_eq!(description["objects"]["Error"]["fields"]["fault_message"], "string");
    }
}
