//! The least that fans out with tokio-tungstenite: what comes on `/publish` goes to everyone else as it is. No patterns,
//! no numbers, no bounds; whatever else says in text is answered as a subscription. It is the mark of what the library allows, with one thread and small read buffers.
//!
//! `bare_hub` prints `{"port":P}` and serves until its standard input closes.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use benchmark_tools::end_with_parent;
use futures_util::{SinkExt, StreamExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};
use tokio_tungstenite::tungstenite::{Message, protocol::WebSocketConfig};
use tokio_tungstenite::{WebSocketStream, accept_hdr_async_with_config};

type Subscribers = Rc<RefCell<Vec<UnboundedSender<Message>>>>;

async fn publisher(mut ws: WebSocketStream<TcpStream>, subscribers: Subscribers) {
    while let Some(Ok(message)) = ws.next().await {
        if message.is_text() || message.is_binary() {
            subscribers.borrow_mut().retain(|each| each.send(message.clone()).is_ok());
        }
    }
}

async fn subscriber(mut ws: WebSocketStream<TcpStream>, mut queue: UnboundedReceiver<Message>) {
    let mut batch = Vec::new();
    loop {
        tokio::select! {
            read = ws.next() => match read {
                Some(Ok(message)) if message.is_text() => batch.push(Message::text(r#"{"action":"subscribed"}"#)),
                Some(Ok(_)) => {}
                _ => return,
            },
            taken = queue.recv_many(&mut batch, 256) => {
                if taken == 0 {
                    return;
                }
            }
        }
        for message in batch.drain(..) {
            if ws.feed(message).await.is_err() {
                return;
            }
        }
        if ws.flush().await.is_err() {
            return;
        }
    }
}

async fn serve(stream: TcpStream, subscribers: Subscribers) {
    let config = WebSocketConfig::default().read_buffer_size(4096);
    let mut publishes = false;
    #[expect(clippy::result_large_err, reason = "the library wants it so")]
    let path = |request: &Request, response: Response| {
        publishes = request.uri().path() == "/publish";
        Ok(response)
    };
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let Ok(ws) = accept_hdr_async_with_config(stream, path, Some(config)).await else { return };
    if publishes {
        publisher(ws, subscribers).await;
    } else {
        let (sender, queue) = unbounded_channel();
        subscribers.borrow_mut().push(sender);
        subscriber(ws, queue).await;
    }
}

#[tokio::main(flavor = "local")]
async fn main() -> io::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    println!("{{\"port\":{}}}", listener.local_addr()?.port());
    end_with_parent();
    let subscribers = Subscribers::default();
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::task::spawn_local(serve(stream, subscribers.clone()));
    }
}
