//! Which channel the host uses, and the conversations on it, one after another.

use std::fs::File;
use std::io;
use std::time::Duration;

use tokio::io::BufReader;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

use crate::port;
use crate::serve::{Conversation, converse};

/// How the host talks to the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Channel {
    /// Over the virtio-serial port.
    Serial,
    /// Over a virtio socket: the agent listens at this port.
    Vsock { port: u32 },
}

impl Channel {
    /// What the VMM has written into the kernel's command line.
    pub(crate) fn announced() -> io::Result<Self> {
        File::open("/proc/cmdline").and_then(io::read_to_string).map(|line| Self::parse(&line))
    }

    fn parse(line: &str) -> Self {
        let port =
            line.split_ascii_whitespace().find_map(|word| word.strip_prefix("pyro.vsock=")?.parse().ok());
        port.map_or(Self::Serial, |port| Self::Vsock { port })
    }

    /// Holds conversations for ever; it ends with an error of the channel itself.
    pub(crate) async fn serve(self, conversation: impl Fn() -> Conversation) -> io::Result<()> {
        match self {
            Self::Serial => {
                let (mut from_host, mut to_host) = port::open()?;
                loop {
                    converse(&mut from_host, &mut to_host, conversation()).await?;
                }
            }
            Self::Vsock { port } => {
                let mut listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))?;
                let mut stream = accept(&mut listener).await?;
                loop {
                    let (from_host, mut to_host) = tokio::io::split(stream);
                    let mut from_host = BufReader::new(from_host);
                    let talk = converse(&mut from_host, &mut to_host, conversation());
                    // A host that connects anew has given up the connection before: a restored guest's is dead, and
                    // may not know it.
                    stream = tokio::select! {
                        _ended = talk => accept(&mut listener).await?,
                        newer = accept(&mut listener) => newer?,
                    };
                }
            }
        }
    }
}

/// The pause after a connection that could not be taken.
const BEAT: Duration = Duration::from_millis(50);

/// The next connection of the host's; processes of the guest have no business here.
async fn accept(listener: &mut VsockListener) -> io::Result<VsockStream> {
    loop {
        match listener.accept().await {
            Ok((stream, from)) if from.cid() == VMADDR_CID_HOST => return Ok(stream),
            Ok(_) => {}
            // A guest without descriptors or memory for the moment is no guest without a host.
            Err(_) => tokio::time::sleep(BEAT).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_channel_is_the_one_that_the_command_line_names() {
        assert_eq!(Channel::parse("quiet pyro.vsock=5005 x"), Channel::Vsock { port: 5005 });
        for line in ["", "quiet", "pyro.vsock=", "pyro.vsock=x", "xpyro.vsock=1"] {
            assert_eq!(Channel::parse(line), Channel::Serial, "{line}");
        }
    }
}
