// The operator's page: asks the facility's REST every two seconds, as whoever has the token, and shows what it says.
//
// What comes from the service has been written by users and other machines (names, owners, messages): it reaches the
// page as text nodes and attributes only. The page's policy forbids every other way.
const EVERY_MS = 2000;
const SLOWEST_MS = 15000;
const ANSWER_WITHIN_MS = 45000; // a gateway that hangs keeps the service for so long, once in half a minute
const SAMPLES = 60;
const KEPT = "scistream-token";

const STATES = {
  REQUESTED: "being opened",
  WAITING_HELLO: "waiting for hello",
  LISTENING: "listening, not proven yet",
  READY: "ready",
  STREAMING: "streaming",
  DRAINING: "draining",
  ENDED: "ended",
  FAILED: "failed",
};
const REASONS = {
  finished: "finished in order",
  released: "released by its user",
  lease_expired: "nobody renewed its lease",
  lifetime_reached: "its lifetime is over",
  hello_timeout: "nobody said hello in time",
  aborted_by_producer: "broken off by the producer",
  aborted_by_consumer: "broken off by the consumer",
  target_unreachable: "its target cannot be reached",
  peer_rejected: "the other relay has not proven its key",
  relay_lost: "its relay is gone without a word",
  admin: "ended by an administrator",
};
const LEGS = {
  producer: "the producer's side",
  producer_lan: "the producer's LAN",
  producer_application: "the producing application",
  wan: "the WAN",
  consumer: "the consumer's side",
  consumer_lan: "the consumer's LAN",
  consumer_application: "the consuming application",
  relay: "the relay's processor",
  upstream: "what comes in from the WAN",
};
const PATHS = { splice: "splice, in the kernel", "tls-copy": "tls-copy, encrypted", copy: "copy" };
const MODES = {
  tls: "both relays proven, encrypted",
  auth: "both relays proven, readable on the path",
  none: "not proven, not encrypted",
};
const PROGRESS = ["FAILED", "DRAINING", "STREAMING", "READY", "LISTENING", "WAITING_HELLO", "REQUESTED", "ENDED"];

const byId = (id) => document.getElementById(id);

// --- what is known

// In memory, so that nothing of it is written anywhere; in the tab's storage only where the box was ticked.
let token = sessionStorage.getItem(KEPT) || "";
let round = 0; // of asking: answers to an earlier one count for nothing
let asking = new AbortController();
let timer = 0;
let failures = 0;
let heardAt = 0; // when the last answer came, by performance.now()
let trouble = "";
let gateways = null;
let streams = [];
const past = new Map(); // key of a stream, or "" for all together -> samples of [to consumer, to producer], bit/s
const rows = new Map();
const cards = new Map();

// --- asking

class Refused extends Error {
  constructor(status, said, headers = new Headers()) {
    super(said.message || `the service answered ${status}`);
    this.status = status;
    this.hint = said.hint || "";
    this.retryAfterS = Number(headers.get("Retry-After")) || 0;
    const scope = /scope="([^"]*)"/.exec(headers.get("WWW-Authenticate") || "");
    // that of development mode is no scope that somebody could log in for
    this.scope = scope && !scope[1].startsWith("urn:scistream:") ? scope[1] : "";
  }
}

async function ask(path) {
  const answer = await fetch(path, {
    headers: { Authorization: `Bearer ${token}`, Accept: "application/json" },
    cache: "no-store",
    credentials: "omit",
    redirect: "error",
    referrerPolicy: "no-referrer",
    signal: asking.signal,
  });
  let said = null;
  try {
    said = await answer.json();
  } catch (wrong) {
    if (wrong.name === "AbortError") throw wrong;
  }
  if (!answer.ok) throw new Refused(answer.status, said || {}, answer.headers);
  if (!said || said.protocol !== 1) throw new Refused(answer.status, { message: "what answers here is another version" });
  return said;
}

async function poll() {
  stop();
  const mine = round;
  const { signal } = asking;
  let pause = EVERY_MS;
  const hurry = setTimeout(() => asking.signal === signal && asking.abort(), ANSWER_WITHIN_MS);
  try {
    const seen = await ask("gateways");
    const query = new URLSearchParams();
    if (seen.administrator) query.set("all_owners", "true");
    if (byId("ended").checked) query.set("include_ended", "true");
    const listing = await ask(`streams?${query}`);
    if (mine !== round) return;
    if (failures) say("The service answers again.");
    gateways = seen;
    streams = listing.streams;
    heardAt = performance.now();
    failures = 0;
    trouble = "";
    remember();
    show();
  } catch (wrong) {
    if (mine !== round) return;
    if (!(wrong instanceof Refused || wrong instanceof TypeError || wrong.name === "AbortError")) throw wrong;
    if (wrong.status === 401) {
      const wanted = wrong.scope ? ` It takes tokens for the scope ${wrong.scope}` : "";
      leave(`The service refuses this token: ${wrong.message}.${wanted}`);
      return;
    }
    failures += 1;
    pause = Math.min(SLOWEST_MS, EVERY_MS * 2 ** Math.min(failures - 1, 4));
    trouble = "The service does not answer; trying again.";
    if (wrong instanceof Refused) {
      trouble = `The service refuses this: ${wrong.message}. ${wrong.hint}`;
      pause = Math.max(pause, 1000 * wrong.retryAfterS);
    }
    show();
  } finally {
    clearTimeout(hurry);
  }
  if (!document.hidden) timer = setTimeout(poll, pause);
}

function stop() {
  clearTimeout(timer);
  round += 1;
  asking.abort();
  asking = new AbortController();
}

function remember() {
  const here = new Map([["", [0, 0]]]);
  for (const stream of streams) {
    const rates = over(stream) ? [0, 0] : [stream.bits_per_s.to_consumer, stream.bits_per_s.to_producer];
    here.set(key(stream), rates);
    here.get("")[0] += rates[0];
    here.get("")[1] += rates[1];
  }
  for (const known of [...past.keys()]) if (!here.has(known)) past.delete(known);
  for (const [name, rates] of here) {
    const samples = past.get(name) || [];
    past.set(name, [...samples, rates].slice(-SAMPLES));
  }
}

const key = (stream) => [stream.owner, stream.role, stream.mode, stream.uid].join(" ");
const over = (stream) => stream.state === "ENDED" || stream.state === "FAILED";

// --- in words

function inUnits(value, unit) {
  if (!(value >= 1)) return `0 ${unit}`;
  const prefixes = ["", "k", "M", "G", "T", "P"];
  const step = Math.min(prefixes.length - 1, Math.floor(Math.log10(value) / 3));
  const scaled = value / 1000 ** step;
  const digits = step === 0 || scaled >= 100 ? 0 : scaled >= 10 ? 1 : 2;
  return `${scaled.toFixed(digits)} ${prefixes[step]}${unit}`;
}

function inTime(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 120) return `${whole} s`;
  if (whole < 7200) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 172800) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

function shortened(owner) {
  const globus = /^urn:globus:(auth:identity|groups:id):(.{8}).*(.{4})$/.exec(owner);
  if (globus) return `${globus[2]}…${globus[3]}`;
  const unix = /^urn:scistream:unix:(.+)$/.exec(owner);
  const name = unix ? `account ${unix[1]}` : owner.slice(4);
  return name.length > 28 ? `${name.slice(0, 20)}…${name.slice(-7)}` : name;
}

function limitedBy(stream) {
  if (over(stream)) return "";
  const limiting = stream.limiting;
  if (!limiting || !limiting.leg) return "nothing moves";
  const words = LEGS[limiting.leg] || limiting.leg;
  return limiting.share == null ? words : `${words}, ${Math.round(100 * limiting.share)}\u00a0%`;
}

function pathOf(stream) {
  const found = new Set();
  for (const relay of stream.relays)
    for (const connection of relay.streams || [])
      for (const path of Object.values(connection.path || {})) if (path) found.add(PATHS[path] || path);
  return [...found].sort().join("; ");
}

const gatewaysOf = (stream) => [...new Set(stream.relays.map((relay) => relay.gateway).filter(Boolean))];

// --- drawing

function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  made.append(...children);
  return made;
}

function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function drawn(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  return made;
}

function sparkline(samples, words) {
  const width = 120;
  const height = 30;
  const most = Math.max(1, ...samples.flat());
  const at = (index, rate) => {
    const x = width - (samples.length - 1 - index) * (width / (SAMPLES - 1));
    return `${x.toFixed(1)},${(height - 1.5 - (height - 3) * (rate / most)).toFixed(1)}`;
  };
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img" });
  const title = drawn("title", {});
  title.append(`${words}, at most ${inUnits(most > 1 ? most : 0, "bit/s")}`);
  svg.append(title);
  svg.append(drawn("path", { class: "ground", d: `M0 ${height - 0.5}H${width}` }));
  if (most > 1) {
    const line = samples.map((rates, index) => at(index, rates[0])).join(" ");
    const [first] = at(0, 0).split(",");
    svg.append(drawn("polygon", { class: "area", points: `${first},${height} ${line} ${width},${height}` }));
    svg.append(drawn("polyline", { class: "to-consumer", points: line }));
    if (samples.some((rates) => rates[1] > 0.02 * most))
      svg.append(drawn("polyline", { class: "to-producer", points: samples.map((rates, i) => at(i, rates[1])).join(" ") }));
  }
  return svg;
}

function show() {
  byId("entry").hidden = Boolean(token);
  byId("forget").hidden = !token;
  byId("pulse").hidden = !token;
  byId("figures").hidden = !token || gateways === null;
  if (token && gateways !== null) {
    showHead();
    showGateways();
    showStreams();
  }
  tick();
}

function showHead() {
  put(byId("facility"), gateways.facility);
  document.title = `${gateways.facility}: streams`;
  const whose = gateways.administrator ? "administrator: everybody's streams" : "your streams";
  put(byId("who"), `${shortened(gateways.caller)}, ${whose}`);
  byId("who").title = gateways.caller;
  const living = streams.filter((stream) => !over(stream));
  const [toConsumer, toProducer] = past.get("").at(-1);
  put(byId("count"), String(living.length));
  put(byId("open"), String(living.reduce((sum, stream) => sum + stream.connections.active, 0)));
  put(byId("rate-to-consumer"), inUnits(toConsumer, "bit/s"));
  put(byId("rate-to-producer"), inUnits(toProducer, "bit/s"));
  byId("total").replaceChildren(sparkline(past.get(""), "Throughput of all streams in the last two minutes"));
}

function showGateways() {
  const list = byId("gateways");
  const names = new Set(gateways.gateways.map((gateway) => gateway.name));
  for (const [name, card] of [...cards])
    if (!names.has(name)) {
      card.remove();
      cards.delete(name);
    }
  for (const gateway of gateways.gateways) {
    const card = cards.get(gateway.name) || make("li");
    cards.set(gateway.name, card);
    card.className = `gateway${gateway.answers ? "" : " silent"}${gateway.draining ? " draining" : ""}`;
    const conditions = [gateway.answers ? "" : "does not answer", gateway.draining ? "draining: no new streams" : ""];
    const condition = conditions.filter(Boolean).join("; ") || "in service";
    const carried = [0, 0];
    for (const stream of streams)
      for (const relay of over(stream) ? [] : stream.relays)
        if (relay.gateway === gateway.name) {
          carried[0] += relay.bits_per_s.to_consumer;
          carried[1] += relay.bits_per_s.to_producer;
        }
    const [arrow, back] = arrows();
    const parts = [
      make("div", { class: "gateway-head" }, make("h3", {}, gateway.name), make("span", { class: "condition" }, condition)),
      make("p", {}, arrow, inUnits(carried[0], "bit/s"), "  ", back, inUnits(carried[1], "bit/s")),
    ];
    if (gateway.message) parts.push(make("p", { class: "why" }, gateway.message));
    const count = gateway.streams;
    const yours = gateways.administrator ? "" : "your ";
    parts.push(
      make(
        "div",
        { class: "load" },
        make("span", { class: "label" }, gateways.administrator ? "Streams" : "Your streams"),
        make("span", {}, String(count)),
      ),
      load(`${yours}ports`, gateway.listeners, gateway.ports, String),
      load(`${yours}connections, booked`, gateway.connections, gateway.connection_budget, String),
      load(`${yours}rate, reserved`, gateway.reserved_mbits_per_s, gateway.capacity_mbits_per_s, (mbits) =>
        inUnits(mbits * 1e6, "bit/s"),
      ),
    );
    card.replaceChildren(...parts);
    if (card.parentNode !== list) list.append(card);
  }
  byId("no-gateways").hidden = names.size > 0;
  put(byId("no-gateways"), "You have no streams on any gateway. The load of all gateways is for administrators.");
}

function load(what, used, limit, words) {
  const label = make("span", { class: "label" }, what[0].toUpperCase() + what.slice(1));
  if (!limit) {
    const unlimited = gateways.administrator ? ", no limit" : "";
    return make("div", { class: "load" }, label, make("span", {}, `${words(used)}${unlimited}`));
  }
  const share = Math.min(1, used / limit);
  const full = share >= 0.9;
  const said = `${words(used)} of ${words(limit)}${share >= 1 ? ", full" : full ? ", nearly full" : ""}`;
  const filling = make("div");
  filling.style.width = `${100 * share}%`;
  const bar = make("div", {
    class: "bar",
    role: "meter",
    "aria-label": what,
    "aria-valuemin": 0,
    "aria-valuemax": limit,
    "aria-valuenow": Math.min(used, limit),
    "aria-valuetext": said,
  });
  bar.append(filling);
  return make("div", { class: full ? "load full" : "load" }, label, make("span", {}, said), bar);
}

function arrows() {
  return [
    make("span", { class: "arrow", title: "to consumers" }, "→ "),
    make("span", { class: "arrow back", title: "to producers" }, "← "),
  ];
}

const ORDERS = {
  name: (a, b) => compare(a.uid, b.uid),
  owner: (a, b) => compare(a.owner, b.owner),
  rate: (a, b) => sum(b.bits_per_s) - sum(a.bits_per_s),
  bytes: (a, b) => sum(b.bytes) - sum(a.bytes),
  lease: (a, b) => (a.lease_remaining_s ?? Infinity) - (b.lease_remaining_s ?? Infinity) || 0,
  state: (a, b) => PROGRESS.indexOf(a.state) - PROGRESS.indexOf(b.state),
};
const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
const sum = (counts) => counts.to_consumer + counts.to_producer;

function showStreams() {
  const wanted = byId("filter").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const order = ORDERS[byId("sort").value];
  const shown = streams
    .filter((stream) => {
      const text = [stream.uid, stream.owner, stream.role, stream.mode, STATES[stream.state], stream.state]
        .concat(REASONS[stream.reason] || [], limitedBy(stream), pathOf(stream), gatewaysOf(stream), stream.message || [])
        .join(" ")
        .toLowerCase();
      return wanted.every((word) => text.includes(word));
    })
    .sort((a, b) => order(a, b) || compare(a.uid, b.uid) || compare(b.role, a.role) || compare(a.owner, b.owner));
  const body = byId("rows");
  const keys = new Set(shown.map(key));
  for (const [name, row] of [...rows])
    if (!keys.has(name)) {
      row.line.remove();
      rows.delete(name);
    }
  shown.forEach((stream, index) => {
    const row = rows.get(key(stream)) || newRow(stream);
    rows.set(key(stream), row);
    fill(row, stream);
    if (body.children[index] !== row.line) body.insertBefore(row.line, body.children[index] || null);
  });
  byId("streams").hidden = shown.length === 0;
  const empty = byId("no-streams");
  empty.hidden = shown.length > 0;
  if (streams.length) put(empty, `No stream matches “${byId("filter").value.trim()}”.`);
  else if (gateways.administrator) put(empty, "No streams at this facility. They appear here when somebody opens one.");
  else put(empty, "You have no streams at this facility. They appear here when you open one, or are named in one.");
}

function newRow(stream) {
  const part = (name, label) => make("td", { class: `c-${name}`, role: "cell", "data-label": label });
  const row = {
    line: make("tr", { role: "row" }),
    stream: part("stream", "Stream"),
    owner: part("owner", "Owner"),
    state: make("div", { class: "state" }),
    message: make("div", { class: "message" }),
    spark: make("div", { class: "spark" }),
    toConsumer: make("span"),
    toProducer: make("span"),
    carriedOn: make("span"),
    carriedBack: make("span"),
    connections: make("div", { class: "nowrap" }),
    refused: make("div", { class: "soft" }),
    limited: part("limited", "Limited by"),
    lease: make("div", { class: "nowrap" }),
    lifetime: make("div", { class: "soft nowrap" }),
    path: make("span"),
    where: make("span", { class: "soft nowrap" }),
  };
  row.stream.append(
    make("div", { class: "uid" }, stream.uid),
    make(
      "span",
      { class: "tag", title: stream.role === "PROD" ? "beside the application that listens" : "beside the one that connects" },
      stream.role,
    ),
    make("span", { class: stream.mode === "none" ? "tag open" : "tag", title: MODES[stream.mode] || "" }, stream.mode),
  );
  const mine = stream.owner === gateways.caller;
  const owner = make("button", { class: "owner", type: "button", title: stream.owner, "aria-expanded": "false" });
  const short = mine ? "you" : shortened(stream.owner);
  owner.append(short);
  owner.addEventListener("click", () => {
    const whole = owner.getAttribute("aria-expanded") === "false";
    owner.setAttribute("aria-expanded", String(whole));
    put(owner, whole ? stream.owner : short);
  });
  row.owner.append(owner);
  const state = part("state", "State");
  state.append(row.state, row.message);
  const [arrow, back] = arrows();
  const throughput = part("throughput", "Throughput, last 2 min");
  throughput.append(
    make(
      "div",
      { class: "throughput" },
      row.spark,
      make("div", {}, make("div", { class: "rate" }, arrow, row.toConsumer), make("div", { class: "rate" }, back, row.toProducer)),
    ),
  );
  const [on, off] = arrows();
  const carried = part("carried", "Carried");
  carried.append(make("div", { class: "rate" }, on, row.carriedOn), make("div", { class: "rate" }, off, row.carriedBack));
  const connections = part("connections", "Connections");
  connections.append(row.connections, row.refused);
  const lease = part("lease", "Lease");
  lease.append(row.lease, row.lifetime);
  const path = part("path", "Path");
  path.append(row.path, " ", row.where);
  row.line.append(row.stream, row.owner, state, throughput, carried, connections, row.limited, lease, path);
  return row;
}

function fill(row, stream) {
  const ended = over(stream);
  const states = STATES[stream.state] || stream.state;
  const unheard = stream.state === "REQUESTED" && stream.message;
  row.line.className = Object.hasOwn(STATES, stream.state) ? `s-${stream.state}` : "";
  put(row.state, unheard ? "not heard of" : stream.reason ? `${states}: ${REASONS[stream.reason] || stream.reason}` : states);
  put(row.message, stream.message || "");
  row.spark.replaceChildren(sparkline(past.get(key(stream)) || [], `Throughput of ${stream.uid} in the last two minutes`));
  row.spark.hidden = ended;
  put(row.toConsumer, ended ? "–" : inUnits(stream.bits_per_s.to_consumer, "bit/s"));
  put(row.toProducer, ended ? "–" : inUnits(stream.bits_per_s.to_producer, "bit/s"));
  put(row.carriedOn, inUnits(stream.bytes.to_consumer, "B"));
  put(row.carriedBack, inUnits(stream.bytes.to_producer, "B"));
  put(row.connections, `${stream.connections.active} now, ${stream.connections.total} in all`);
  const { refused, aborted } = stream.connections;
  put(row.refused, [refused ? `${refused} refused` : "", aborted ? `${aborted} broken off` : ""].filter(Boolean).join(", "));
  put(row.limited, limitedBy(stream) || "–");
  put(row.path, pathOf(stream) || "–");
  put(row.where, gatewaysOf(stream).length ? `on ${gatewaysOf(stream).join(", ")}` : "");
  row.left = ended ? null : stream.lease_remaining_s ?? null;
  row.life = ended ? null : stream.lifetime_remaining_s ?? null;
}

// Between two answers time goes on: leases count down, and the page says how old it is.
function tick() {
  if (!token) return;
  const age = (performance.now() - heardAt) / 1000;
  const late = heardAt > 0 && age > (3 * EVERY_MS) / 1000;
  byId("pulse").className = failures ? "gone" : late ? "late" : "";
  let words = "asking the service";
  if (heardAt > 0) words = failures || late ? `last seen ${inTime(age)} ago` : "live";
  put(byId("pulse-words"), words);
  byId("trouble").hidden = !trouble;
  put(byId("trouble-words"), trouble);
  put(byId("trouble-age"), heardAt > 0 ? `Last seen ${inTime(age)} ago.` : "");
  byId("figures").classList.toggle("stale", failures > 0);
  for (const row of rows.values()) {
    put(row.lease, row.left === null ? "–" : row.left <= age ? "has run out" : inTime(row.left - age));
    row.lease.classList.toggle("soon", row.left !== null && row.left - age < 10);
    put(row.lifetime, row.life === null ? "" : `ends in ${inTime(row.life - age)}`);
  }
}

const say = (words) => put(byId("news"), words);

// --- coming and going

function enter(event) {
  event.preventDefault();
  const given = byId("token").value.trim().replace(/^bearer\s+/i, "");
  byId("refusal").hidden = true;
  if (!/^[\x21-\x7e]+$/.test(given)) {
    refuse("This is no token: it has blanks, or characters that no token has.");
    return;
  }
  token = given;
  byId("token").value = "";
  if (byId("keep").checked) sessionStorage.setItem(KEPT, token);
  show();
  poll();
}

function leave(why) {
  stop();
  sessionStorage.removeItem(KEPT);
  token = "";
  gateways = null;
  streams = [];
  heardAt = 0;
  failures = 0;
  trouble = "";
  past.clear();
  for (const row of rows.values()) row.line.remove();
  rows.clear();
  for (const card of cards.values()) card.remove();
  cards.clear();
  byId("trouble").hidden = true;
  put(byId("facility"), "SciStream");
  put(byId("who"), "");
  byId("who").removeAttribute("title");
  document.title = "SciStream";
  show();
  refuse(why);
  byId("token").focus();
}

function refuse(why) {
  put(byId("refusal"), why);
  byId("refusal").hidden = !why;
}

byId("entry").addEventListener("submit", enter);
byId("forget").addEventListener("click", () => leave(""));
for (const id of ["filter", "sort"]) byId(id).addEventListener("input", () => gateways && showStreams());
byId("ended").addEventListener("input", () => token && poll());
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && token) poll();
});
setInterval(tick, 1000);
show();
if (token) poll();
