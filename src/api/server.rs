//! The API thread: HTTP/1.1 on a listening Unix socket.
//!
//! One current-thread runtime. A connection takes requests one after another (keep-alive,
//! pipelining); each becomes one command to the vmm thread and waits for its one answer. The
//! thread ends when nobody can send events any more: it lets the replies under way and the last
//! event out, then closes.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::thread;
use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Response, StatusCode, Version};
use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use super::error::ApiError;
use super::routes::{self, Action, Ask};
use super::types;
use crate::config::SnapshotType;
use crate::control::{self, Command, CommandSender, Event, Gone, Subscription};
use crate::metrics::{self, METRICS};
use crate::warn_limited;

/// What clients may take.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of a request's body (`--http-api-max-payload-size`).
    pub max_payload: usize,
    /// Connections served at once; further ones are told 503.
    pub connections: usize,
    /// How long a client may take until its first request's head is there, and how long it keeps its place in silence.
    pub head_timeout: Duration,
    /// How long a client may take to send a request's body.
    pub body_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_payload: 51_200,
            connections: 10,
            head_timeout: Duration::from_secs(60),
            body_timeout: Duration::from_secs(10),
        }
    }
}

/// Memory for the head of a request, and so the longest one, in bytes.
const HEAD_BUFFER: usize = 16 << 10;
/// Connections that are being told that there are too many; yet more wait to be accepted.
const TURNED_AWAY: usize = 4;
/// How long turning a connection away may take.
const TURN_AWAY_TIMEOUT: Duration = Duration::from_secs(1);
/// How much of an oversized body is read and dropped, so that its sender reads the refusal.
const DRAIN: usize = 1 << 20;
/// How long replies under way may take when the thread ends.
const GRACE: Duration = Duration::from_millis(100);
/// Events the runtime takes per wait: its default of a thousand would be three pages of every process.
const EVENTS: usize = 16;
/// Stack of the API thread in bytes.
const STACK: usize = 256 << 10;

const OPENAPI: &str = include_str!("../../resources/openapi.yaml");

struct Server {
    limits: Limits,
    to_vmm: CommandSender,
    events: broadcast::Receiver<Event>,
    /// Places that are asked back from clients that have been silent for long.
    wanted: Semaphore,
}

/// Starts the API thread on a listener that does not block; `confine` is the last thing it does before it serves. It ends
/// when the publisher of the events is dropped.
///
/// # Errors
/// No runtime or thread could be made.
pub fn spawn(
    listener: StdUnixListener,
    limits: Limits,
    to_vmm: CommandSender,
    Subscription { events, mut open }: Subscription,
    confine: impl FnOnce() + Send + 'static,
) -> io::Result<thread::JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_io_events_per_tick(EVENTS)
        .build()?;
    let listener = {
        let _context = runtime.enter();
        UnixListener::from_std(listener)?
    };
    let server = Arc::new(Server { limits, to_vmm, events, wanted: Semaphore::new(0) });
    thread::Builder::new().name("api".into()).stack_size(STACK).spawn(move || {
        confine();
        let ended = async { while open.changed().await.is_ok() {} };
        runtime.block_on(serve(&listener, &server, ended));
    })
}

/// What came first.
enum First<A, B> {
    Left(A),
    Right(B),
}

async fn first<A, B>(left: impl Future<Output = A>, right: impl Future<Output = B>) -> First<A, B> {
    let (mut left, mut right) = (pin!(left), pin!(right));
    std::future::poll_fn(|context| {
        if let Poll::Ready(output) = left.as_mut().poll(context) {
            return Poll::Ready(First::Left(output));
        }
        right.as_mut().poll(context).map(First::Right)
    })
    .await
}

async fn serve(listener: &UnixListener, server: &Arc<Server>, ended: impl Future<Output = ()>) {
    let (stop, stopped) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut earlier: Option<JoinHandle<()>> = None;
    let mut ended = pin!(ended);
    loop {
        let accepted = match first(ended.as_mut(), accept(listener, &mut connections, server)).await {
            First::Left(()) => break,
            First::Right(accepted) => accepted,
        };
        match accepted {
            Ok(stream) => {
                let busy = connections.len() >= server.limits.connections && !make_room(&mut connections, server).await;
                if earlier.as_ref().is_none_or(JoinHandle::is_finished) {
                    earlier = Some(tokio::spawn(expect_earlier_wakes(Arc::clone(server))));
                }
                connections.spawn(connection(Arc::clone(server), stream, busy, stopped.clone()));
            }
            Err(error) => {
                warn_limited!("cannot accept an API connection: {error}");
                // Most likely there are no descriptors left: trying again at once would spin.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(stop);
    let _ = timeout(GRACE, async { while connections.join_next().await.is_some() {} }).await;
}

/// While there are connections, keeps a timer that ends before those of their heads. The runtime wakes itself, by a write
/// and another wait, for a timer that ends before all others, and each request sets one.
async fn expect_earlier_wakes(server: Arc<Server>) {
    // Held here, by the accepting task and by each connection.
    while Arc::strong_count(&server) > 2 {
        tokio::time::sleep(server.limits.head_timeout / 2).await;
    }
}

/// The next connection, once there is a place for it.
async fn accept(listener: &UnixListener, connections: &mut JoinSet<()>, server: &Server) -> io::Result<UnixStream> {
    while connections.len() >= server.limits.connections + TURNED_AWAY {
        connections.join_next().await;
    }
    let (stream, _) = listener.accept().await?;
    while connections.try_join_next().is_some() {}
    Ok(stream)
}

/// Whether a client that has been silent for long gave up its place. The one that has been for longest does.
async fn make_room(connections: &mut JoinSet<()>, server: &Server) -> bool {
    server.wanted.add_permits(1);
    // Whoever waits for it runs now.
    tokio::task::yield_now().await;
    if let Ok(wanted) = server.wanted.try_acquire() {
        wanted.forget();
    }
    while connections.try_join_next().is_some() {}
    connections.len() < server.limits.connections
}

/// Whose turn it is on a connection.
#[derive(Clone, Copy)]
enum Turn {
    /// The client's, which has yet to send a request.
    First,
    /// Ours, to answer.
    Answer,
    /// The client's, which was answered. It may be silent, or stop halfway, while nobody wants its place: clients are
    /// known that connect once.
    Next,
}

/// Ends when a connection is to be closed because its client lets others wait.
async fn overdue(mut turn: watch::Receiver<Turn>, limit: Duration, server: &Server) {
    loop {
        let now = *turn.borrow_and_update();
        let overdue = async {
            match now {
                Turn::First => tokio::time::sleep(limit).await,
                Turn::Answer => std::future::pending().await,
                Turn::Next => {
                    tokio::time::sleep(limit).await;
                    if let Ok(wanted) = server.wanted.acquire().await {
                        wanted.forget();
                    }
                }
            }
        };
        if let First::Right(()) = first(turn.changed(), overdue).await {
            return;
        }
    }
}

/// Serves a connection until its client closes it or asks for that. Clients of HTTP/1.0 are known that send one request
/// after the other on a connection without asking that it be kept, so it is.
async fn connection(server: Arc<Server>, mut stream: UnixStream, busy: bool, mut stop: watch::Receiver<()>) {
    let mut builder = http1::Builder::new();
    builder.header_read_timeout(None).max_buf_size(HEAD_BUFFER).keep_alive(!busy).auto_date_header(false);
    let limit = if busy { TURN_AWAY_TIMEOUT } else { server.limits.head_timeout };
    let (turn, turns) = watch::channel(Turn::First);
    loop {
        let is_kept = AtomicBool::new(false);
        let service = service_fn(|request| {
            let (server, is_kept, turn) = (Arc::clone(&server), &is_kept, &turn);
            Box::pin(async move {
                turn.send_replace(Turn::Answer);
                let (head, mut body) = request.into_parts();
                let response = if busy { turn_away() } else { server.answer(&head, &mut body).await };
                let is_whole = matches!(response.body(), Reply::Whole(_));
                // A reply without a length ends with the connection, and what is left of a body is no request.
                let may_be_kept = !busy && is_whole && body.is_end_stream();
                is_kept.store(may_be_kept && is_unaware_of_keep_alive(&head), Ordering::Relaxed);
                if is_whole {
                    turn.send_replace(Turn::Next);
                }
                Ok::<_, Infallible>(response)
            })
        });
        let mut serving = builder.serve_connection(TokioIo::new(stream), service);
        let served = std::future::poll_fn(|context| serving.poll_without_shutdown(context));
        let served = first(served, overdue(turns.clone(), limit, &server));
        match first(stop.changed(), served).await {
            First::Left(_) => {
                Pin::new(&mut serving).graceful_shutdown();
                let _ = serving.await;
                return;
            }
            First::Right(First::Left(Ok(()))) if is_kept.load(Ordering::Relaxed) => {}
            First::Right(First::Left(Ok(()))) => {
                let _ = serving.await;
                return;
            }
            // What goes wrong on a connection (a parse error, a client that left) is its client's affair.
            First::Right(First::Left(Err(_)) | First::Right(())) => return,
        }
        let parts = serving.into_parts();
        // Nobody is known who does not wait for the reply.
        if !parts.read_buf.is_empty() {
            return;
        }
        stream = parts.io.into_inner();
    }
}

/// Whether a request is of HTTP/1.0 and does not say whether its connection is to be kept.
fn is_unaware_of_keep_alive(request: &Parts) -> bool {
    request.version == Version::HTTP_10 && !request.headers.contains_key(CONNECTION)
}

fn turn_away() -> Response<Reply> {
    METRICS.api_server.connections_refused.inc();
    let message = "Too many connections are open; close one and try again.".to_owned();
    refuse(&ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message))
}

impl Server {
    async fn answer(&self, head: &Parts, body: &mut Incoming) -> Response<Reply> {
        let (method, path) = (&head.method, head.uri.path());
        let answered = async {
            let body = self.read(body).await?;
            match routes::route(method, path, &body)? {
                Action::Ask(ask) => self.ask(ask).await,
                Action::Version => Ok(data("application/json", routes::version())),
                Action::Metrics => Ok(data(metrics::OPENMETRICS_TYPE, metrics::openmetrics().into())),
                Action::OpenApi => Ok(reply("application/yaml", Reply::Whole(Bytes::from_static(OPENAPI.as_bytes())))),
                Action::Events => Ok(reply("text/event-stream", Reply::Events(Events::new(self.events.resubscribe())))),
            }
        };
        match answered.await {
            Ok(response) => {
                log::debug!("{method} {path}: {}", response.status().as_u16());
                response
            }
            Err(error) => {
                warn_limited!("{method} {path}: {} {error}", error.status().as_u16());
                refuse(&error)
            }
        }
    }

    /// Sends a command and waits for its answer.
    async fn ask(&self, ask: Ask) -> Result<Response<Reply>, ApiError> {
        let start = Instant::now();
        let latency = match &ask.command {
            Command::Pause => Some(&METRICS.latencies_us.pause_vm),
            Command::Resume => Some(&METRICS.latencies_us.resume_vm),
            Command::LoadSnapshot(_) => Some(&METRICS.latencies_us.load_snapshot),
            Command::CreateSnapshot(request) => Some(match request.kind {
                SnapshotType::Full => &METRICS.latencies_us.full_create_snapshot,
                SnapshotType::Diff => &METRICS.latencies_us.diff_create_snapshot,
            }),
            _ => None,
        };
        let answer = self.to_vmm.send(ask.command)?.await.map_err(|_| Gone)?;
        let answer = match answer {
            Ok(control::Reply::DoesNotFit(refusal)) => Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, refusal.0)),
            answer => answer.map_err(ApiError::from),
        };
        let answer = answer.inspect_err(|_| _ = ask.refusals.inspect(|counter| counter.inc()))?;
        if let Some(latency) = latency {
            latency.set(u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX));
        }
        let mut response = match routes::show(&answer) {
            Some(json) => data("application/json", json),
            None => {
                let mut done = Response::new(Reply::Whole(Bytes::new()));
                *done.status_mut() = StatusCode::NO_CONTENT;
                done
            }
        };
        if ask.deprecated {
            METRICS.deprecated_api.deprecated_http_api_calls.inc();
            let deprecation = (HeaderName::from_static("deprecation"), HeaderValue::from_static("true"));
            response.headers_mut().insert(deprecation.0, deprecation.1);
        }
        Ok(response)
    }

    /// The body of a request.
    async fn read(&self, body: &mut Incoming) -> Result<Vec<u8>, ApiError> {
        if body.is_end_stream() {
            return Ok(Vec::new());
        }
        let seconds = self.limits.body_timeout.as_secs();
        timeout(self.limits.body_timeout, collect(body, self.limits.max_payload)).await.map_err(|_| {
            ApiError::bad_request(format!(
                "The request's body did not arrive within {seconds} seconds; send all of it."
            ))
        })?
    }
}

async fn collect(body: &mut Incoming, limit: usize) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    let mut read = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| ApiError::bad_request(format!("The request's body is broken: {error}.")))?;
        let chunk = frame.into_data().unwrap_or_default();
        read += chunk.len();
        if read <= limit {
            bytes.extend_from_slice(&chunk);
        } else if read > limit.saturating_add(DRAIN) {
            break;
        }
    }
    if read <= limit {
        return Ok(bytes);
    }
    Err(ApiError::bad_request(format!(
        "The request's body is larger than {limit} bytes; send less or start with a larger --http-api-max-payload-size."
    )))
}

fn reply(content_type: &'static str, body: Reply) -> Response<Reply> {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

fn data(content_type: &'static str, body: Vec<u8>) -> Response<Reply> {
    reply(content_type, Reply::Whole(body.into()))
}

fn refuse(error: &ApiError) -> Response<Reply> {
    let mut response = data("application/json", error.body());
    *response.status_mut() = error.status();
    response
}

/// The body of a reply.
enum Reply {
    /// All there is; empty once it was sent.
    Whole(Bytes),
    /// Lifecycle changes as they come.
    Events(Events),
}

impl Body for Reply {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Self::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Whole(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Self::Events(events) => events.poll(context).map(|message| message.map(|text| Ok(Frame::data(text)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(bytes) if bytes.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Events(_) => SizeHint::default(),
        }
    }
}

type Received = (broadcast::Receiver<Event>, Result<Event, RecvError>);

/// Server-sent events (WHATWG HTML §9.2): the next one being waited for, `None` after the last.
/// One that a client is too slow for is lost to it.
struct Events(Option<Pin<Box<dyn Future<Output = Received> + Send>>>);

impl Events {
    fn new(mut events: broadcast::Receiver<Event>) -> Self {
        Self(Some(Box::pin(async move {
            let event = events.recv().await;
            (events, event)
        })))
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        while let Some(next) = &mut self.0 {
            let Poll::Ready((events, event)) = next.as_mut().poll(context) else { return Poll::Pending };
            match event {
                Ok(event) => {
                    *self = Self::new(events);
                    return Poll::Ready(Some(message(event)));
                }
                Err(RecvError::Lagged(_)) => *self = Self::new(events),
                Err(RecvError::Closed) => self.0 = None,
            }
        }
        Poll::Ready(None)
    }
}

fn message(event: Event) -> Bytes {
    let (name, state, status, reason) = match event {
        Event::Started => ("started", types::EventState::Running, None, None),
        Event::Paused => ("paused", types::EventState::Paused, None, None),
        Event::Resumed => ("resumed", types::EventState::Running, None, None),
        Event::Exited { status, reason } => ("exited", types::EventState::Exited, Some(status), Some(reason)),
    };
    let event = types::LifecycleEvent { state, status, reason };
    let json = serde_json::to_string(&event).unwrap_or_default();
    format!("event: {name}\ndata: {json}\n\n").into()
}

#[cfg(any(test, fuzzing))]
pub(crate) mod tests;
