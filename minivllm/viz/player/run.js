"use strict";
/* A run of the engine as the player knows it: a state for each step, built from what changed in it.
   The form of the data is that of pack.py; player.js draws it. */

const PREFILL = 0,
  DECODE = 1,
  AGAIN = 2;
/* What a sequence does in a step, for the timeline. */
const ABSENT = 0,
  WAIT = 1,
  PROMPT = 2,
  TOKEN = 3,
  REPEAT = 4,
  IDLE = 5,
  OVER = 6;

/** "A" … "Z", "AA" …: the name of the index-th sequence in a picture. */
function letterOf(index) {
  let letters = "";
  for (let i = index + 1; i; i = Math.floor((i - 1) / 26))
    letters = String.fromCharCode(65 + ((i - 1) % 26)) + letters;
  return letters;
}

/** Black or white, whichever is easier to read on a colour. */
function inkOn(color) {
  const channel = (k) => {
    const x = parseInt(color.slice(k, k + 2), 16) / 255;
    return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  };
  return 0.2126 * channel(1) + 0.7152 * channel(3) + 0.0722 * channel(5) > 0.2
    ? "#14171f"
    : "#ffffff";
}

/** The run so far: a state for each step, built from what changed. */
class Run {
  constructor(trace, colors) {
    Object.assign(this, trace);
    this.names = [];
    this.asks = [];
    this.letters = [];
    this.colors = [];
    this.palette = colors;
    this.states = [];
    this.texts = [];
    this.lanes = [];
    /* Sequences with smaller numbers are forgotten. */
    this.first = 0;
    this.endedAt = [];
    this.events = [];
    trace.names.forEach((name, i) => this.addName(name, trace.asks[i]));
    trace.steps.forEach((step) => this.append(step));
  }

  addName(name, ask = "") {
    const i = this.names.length;
    this.names.push(name);
    this.asks.push(ask);
    this.letters.push(letterOf(i));
    this.colors.push(this.palette[i % this.palette.length]);
    this.texts.push("");
    this.lanes.push([]);
    this.endedAt.push(Infinity);
  }

  /** Take in the next step; `names` are new sequences as [name, prompt]. */
  append(step, names = []) {
    for (const [name, ask] of names) this.addName(name, ask);
    const i = this.states.length,
      before = this.states[i - 1];
    const tables = new Map(before ? before.tables : []);
    for (const [who, kept, added] of step.b) {
      const table = ((before && before.tables.get(who)) || []).slice(0, kept).concat(added);
      if (table.length) tables.set(who, table);
      else tables.delete(who);
    }
    let cached = before ? before.cached : new Set();
    if (step.c[0].length || step.c[1].length) {
      cached = new Set(cached);
      step.c[1].forEach((block) => cached.delete(block));
      step.c[0].forEach((block) => cached.add(block));
    }
    const lengths = new Map(
      [...(before ? before.lengths : [])].filter(([who]) => who >= this.first),
    );
    for (const [who, text] of step.x) {
      this.texts[who] += text;
      lengths.set(who, this.texts[who].length);
    }
    const state = {
      step: i,
      time: step.t,
      duration: step.d,
      scheduled: step.s,
      tables,
      cached,
      lengths,
      computed: new Map(step.n),
      running: step.r,
      waiting: step.w,
      preempted: step.p,
      free: step.f,
      ended: step.e,
      tokens: [0, 0, 0],
      fresh: new Map(step.x),
      /* who -> [guesses, right ones, the text of the wrong ones] of speculative decoding */
      guesses: new Map((step.g || []).map(([who, ...guess]) => [who, guess])),
    };
    this.states.push(state);
    this.note(state, before);
    return state;
  }

  note(state, before) {
    const i = state.step,
      running = new Set(state.running),
      waiting = new Set(state.waiting),
      doing = new Map();
    for (const [who, kind, , count] of state.scheduled) {
      state.tokens[kind] += count;
      doing.set(who, kind);
    }
    for (let who = this.first; who < this.lanes.length; who++) {
      let does = i > this.endedAt[who] ? OVER : ABSENT;
      if (doing.has(who)) does = [PROMPT, TOKEN, REPEAT][doing.get(who)];
      else if (running.has(who)) does = IDLE;
      else if (waiting.has(who)) does = WAIT;
      this.lanes[who][i] = does;
    }
    const ran = new Set(before ? before.running : []);
    for (const [who, , , , , hit] of state.scheduled) {
      if (!ran.has(who)) this.events.push({ step: i, kind: "admission", who });
      if (hit) this.events.push({ step: i, kind: "hit", who, tokens: hit });
    }
    state.preempted.forEach((who) => this.events.push({ step: i, kind: "preemption", who }));
    state.ended.forEach((who) => {
      this.endedAt[who] = i;
      this.events.push({ step: i, kind: "end", who });
    });
  }

  /** Forget all but about the last `most` steps, and the sequences that ended before these.

      Returns how many steps, and which sequences, are gone. */
  trim(most) {
    const steps = this.states.length - most;
    const names = [];
    // Not at each step: it renumbers everything.
    if (steps <= most / 10) return { steps: 0, names };
    this.states.splice(0, steps);
    this.states.forEach((state) => (state.step -= steps));
    this.lanes.forEach((lane) => lane.splice(0, steps));
    this.endedAt = this.endedAt.map((at) => at - steps);
    this.events = this.events
      .filter((event) => event.step >= steps)
      .map((event) => ({ ...event, step: event.step - steps }));
    while (this.first < this.names.length && this.endedAt[this.first] < 0) {
      names.push(this.first);
      this.texts[this.first] = "";
      this.lanes[this.first] = [];
      this.first += 1;
    }
    return { steps, names };
  }

  /** block -> the sequences whose table names it, in this state. */
  owners(state) {
    if (!state.owners) {
      state.owners = new Map();
      for (const [who, table] of state.tables)
        for (const block of table) {
          if (!state.owners.has(block)) state.owners.set(block, []);
          if (!state.owners.get(block).includes(who)) state.owners.get(block).push(who);
        }
    }
    return state.owners;
  }

  /** What can be said of a step without a picture; the tests compare it with the trace. */
  facts(i) {
    const state = this.states[i],
      owners = this.owners(state);
    return {
      owners: Object.fromEntries(
        [...owners].map(([block, who]) => [block, who.map((w) => this.names[w])]),
      ),
      free: state.free,
      cached: [...state.cached].sort((a, b) => a - b),
      used: this.blocks - state.free,
      shared: [...owners.values()].filter((who) => who.length > 1).length,
      texts: Object.fromEntries(
        [...state.lengths].map(([who, n]) => [this.names[who], this.texts[who].slice(0, n)]),
      ),
      running: state.running.map((w) => this.names[w]),
      waiting: state.waiting.map((w) => this.names[w]),
      tokens: state.tokens.reduce((a, b) => a + b, 0),
    };
  }
}
