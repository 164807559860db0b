/* The player: draws one step of a `Run` (run.js) and has the controls. Plain JavaScript, without a
   library and without a network. */

/* With more running sequences than this, only the followed one has lines to its blocks. */
const MOST_WITH_LINES = 12;

/** The end of a text, at most so long, from the beginning of a word. */
function fromWord(text, most) {
  return text.length <= most ? text : `…${text.slice(-most).replace(/^\S*\s/, "")}`;
}

/** The page around this frame, where the browser lets us ask it; else null. */
function pageAround() {
  try {
    return window.parent !== window && window.parent.document.body ? window.parent.document : null;
  } catch {
    return null;
  }
}

/** Whether that page is dark: JupyterLab, VS Code and the course's site say so; else null. */
function isDark(page) {
  const { jpThemeLight, vscodeThemeKind } = page.body.dataset;
  const { theme } = page.documentElement.dataset;
  if (jpThemeLight) return jpThemeLight === "false";
  if (vscodeThemeKind) return !vscodeThemeKind.includes("light");
  return theme ? theme === "dark" : null;
}

class MinivllmPlayer {
  constructor(root, trace, options) {
    this.run = new Run(trace, options.colors);
    this.root = root;
    this.options = options;
    this.at = 0;
    this.follow = -1;
    this.playing = false;
    this.speed = 5;
    this.live = false;
    this.frames = 0;
    this.rows = new Map();
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.around = pageAround();
    if (this.around) {
      const note = window.frameElement.previousElementSibling;
      if (note && note.className === "mv-note") note.remove();
      const watch = new MutationObserver(() => this.repaint());
      for (const node of [this.around.body, this.around.documentElement])
        watch.observe(node, { attributes: true });
    }
    this.build();
    const asked = new URLSearchParams(location.hash.slice(1));
    this.follow = this.run.letters.indexOf(asked.get("follow") || "");
    if (asked.has("follow")) this.select.value = String(this.follow);
    this.go(asked.has("step") ? Number(asked.get("step")) || 0 : options.step || 0);
    this.scheme.addEventListener("change", () => this.repaint());
    new ResizeObserver(() => this.repaint()).observe(root);
  }

  /* --- the page ------------------------------------------------------------------------------------ */

  build() {
    const make = (tag, more = {}, ...inside) => {
      const node = Object.assign(document.createElement(tag), more);
      node.append(...inside);
      return node;
    };
    this.make = make;
    const button = (text, name, act, key) => {
      const node = make("button", {
        type: "button",
        textContent: text,
        title: key ? `${name} (${key})` : name,
        onclick: act,
      });
      node.setAttribute("aria-label", name);
      return node;
    };
    const run = this.run;
    this.root.className = "mv";
    this.root.replaceChildren();
    const facts = `${run.model}: ${run.blocks} blocks of ${run.size} tokens, at most ${run.seqs} sequences and ${run.budget} tokens per step`;
    const about =
      `In each step the model reads up to ${run.budget} tokens: one for each request that is being answered (decode), the others from prompts.` +
      ` Of every token that it has read it keeps keys and values (KV), in blocks of ${run.size} tokens. Here you see who holds which block.`;
    this.root.append(
      make(
        "div",
        { className: "mv-top" },
        make("h2", { textContent: this.options.title || "minivllm at work" }),
        make("span", { className: "facts", textContent: facts }),
        make("p", { className: "about", textContent: about }),
      ),
    );
    this.playButton = button("Play", "Play or pause", () => this.toggle(), "space");
    this.playButton.className = "play";
    this.slider = make("input", {
      type: "range",
      min: 0,
      value: 0,
      oninput: () => {
        this.pause();
        this.go(Number(this.slider.value));
      },
    });
    this.slider.setAttribute("aria-label", "Step");
    this.counter = make("span", { className: "now" });
    this.kind = make(
      "select",
      {},
      ...["any event", "admission", "hit", "preemption", "end"].map((name) =>
        make("option", { value: name, textContent: name }),
      ),
    );
    this.kind.setAttribute("aria-label", "Kind of event to jump to");
    this.rate = make(
      "select",
      {
        onchange: () => {
          this.speed = Number(this.rate.value);
        },
      },
      ...[1, 2, 5, 10, 30, 60].map((n) =>
        make("option", {
          value: n,
          textContent: `${n} steps/s`,
          selected: n === this.speed,
        }),
      ),
    );
    this.rate.setAttribute("aria-label", "Speed");
    this.select = make(
      "select",
      { onchange: () => this.setFollow(Number(this.select.value)) },
      make("option", { value: -1, textContent: "follow nobody" }),
    );
    this.select.setAttribute("aria-label", "Request to follow");
    const bar = make(
      "div",
      { className: "mv-bar" },
      this.playButton,
      button("◀", "One step back", () => this.step(-1), "left arrow"),
      button("▶", "One step on", () => this.step(1), "right arrow"),
      this.slider,
      this.counter,
      button("« event", "The event before", () => this.jump(-1), "p"),
      button("event »", "The next event", () => this.jump(1), "n"),
      this.kind,
      this.rate,
      this.select,
      button("◐", "Light or dark", () => this.flip(), "t"),
    );
    bar.setAttribute("role", "toolbar");
    bar.setAttribute("aria-label", "Player");
    if (/^(https?|file):/.test(location.protocol))
      bar.append(
        (this.linkButton = button("Link", "Copy a link to this step", () => this.copyLink(), "l")),
      );
    this.news = make("div", { className: "news" });
    this.news.setAttribute("role", "status");
    this.list = make("ul", { className: "rows" });
    this.memory = this.canvas(
      "The KV cache: logical blocks of each sequence above, the pool of physical blocks below",
    );
    this.timeline = this.canvas("Timeline: sequences, tokens per step, KV memory, over all steps");
    const key = (entries) =>
      make(
        "div",
        { className: "key" },
        ...entries.map(([style, text]) => {
          const box = make("i");
          box.style.cssText = style;
          return make("span", {}, box, text);
        }),
      );
    const hatch = "repeating-linear-gradient(45deg, var(--cached) 0 3px, var(--free) 3px 6px)";
    this.root.append(
      bar,
      this.news,
      make(
        "div",
        { className: "grid" },
        make(
          "section",
          { className: "panel" },
          make("h3", { textContent: "Requests, and their texts as they are written" }),
          this.list,
        ),
        make(
          "section",
          { className: "panel" },
          make("h3", { textContent: "Logical blocks, and the pool that they lie in" }),
          this.memory,
          key([
            ["background: var(--decode)", "in use, full"],
            [
              "background: linear-gradient(90deg, var(--decode) 55%, var(--free) 55%)",
              "partly filled",
            ],
            ["border: 3px double var(--ink)", "shared"],
            [`background: ${hatch}`, "cached: free, content known"],
            ["background: var(--free)", "free"],
          ]),
        ),
        make(
          "section",
          { className: "panel wide" },
          make("h3", { textContent: "The scheduler, step by step" }),
          this.timeline,
          key([
            ["background: var(--prompt)", "tokens of a prompt"],
            ["background: var(--decode)", "decode"],
            ["background: var(--again)", "computed again"],
            ["background: var(--soft); height: .2em", "waits"],
            ["border-color: var(--warn); border-width: 0 0 0 3px", "preempted"],
            [
              "border-color: var(--budget); border-width: 2px 0 0",
              "token budget, size of the pool",
            ],
            ["border-top: 2px dashed var(--warn)", "memory that whole lengths would reserve"],
          ]),
        ),
      ),
    );
    this.root.append(
      make(
        "details",
        {},
        make("summary", { textContent: "Keys" }),
        make("p", {
          innerHTML:
            "<kbd>space</kbd> play or pause · <kbd>←</kbd> <kbd>→</kbd> one step · <kbd>Home</kbd> <kbd>End</kbd> first and last step · <kbd>n</kbd> <kbd>p</kbd> next event, event before · <kbd>+</kbd> <kbd>−</kbd> speed · <kbd>f</kbd> follow the next request · <kbd>t</kbd> light or dark · <kbd>l</kbd> copy a link",
        }),
      ),
    );
    this.tip = make("div", { className: "tip", hidden: true });
    this.root.append(this.tip);
    this.root.addEventListener("keydown", (event) => this.onKey(event));
    document.addEventListener("keydown", (event) => {
      if (event.target === document.body) this.onKey(event);
    });
    this.memory.addEventListener("pointermove", (event) => this.hint(event, this.memoryTip(event)));
    this.timeline.addEventListener("pointermove", (event) => {
      if (event.buttons) this.scrub(event);
      this.hint(event, this.timelineTip(event));
    });
    this.timeline.addEventListener("pointerdown", (event) => {
      this.pause();
      this.scrub(event);
    });
    this.memory.addEventListener("pointerdown", (event) => {
      const found = this.blockAt(event);
      if (found && found.who.length) this.setFollow(found.who[0]);
    });
    for (const canvas of [this.memory, this.timeline])
      canvas.addEventListener("pointerleave", () => {
        this.tip.hidden = true;
      });
    this.repaint();
  }

  canvas(name) {
    const node = document.createElement("canvas");
    node.setAttribute("role", "img");
    node.setAttribute("aria-label", name);
    node.dataset.name = name;
    return node;
  }

  /* --- what the controls do ------------------------------------------------------------------------ */

  toggle() {
    if (this.playing) this.pause();
    else this.play();
  }

  play() {
    if (this.at >= this.last) this.go(0);
    this.playing = true;
    this.playButton.textContent = "Pause";
    this.news.setAttribute("aria-live", "off");
    let before = performance.now(),
      due = 0;
    const frame = (now) => {
      if (!this.playing) return;
      due += ((now - before) * this.speed) / 1000;
      before = now;
      this.frames += 1;
      if (due >= 1) {
        this.go(Math.min(this.last, this.at + Math.floor(due)));
        due %= 1;
      }
      if (this.at >= this.last && !this.live) this.pause();
      else requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  }

  pause() {
    this.playing = false;
    this.playButton.textContent = "Play";
    this.news.setAttribute("aria-live", "polite");
    if (this.state) this.address();
  }

  /** Put the address of this step where Paste finds it, and say whether that worked. */
  async copyLink() {
    let said = "Copied";
    try {
      await navigator.clipboard.writeText(location.href);
    } catch {
      said = "Copy it from the address bar";
    }
    if (!this.linkButton) return;
    this.linkButton.textContent = said;
    setTimeout(() => (this.linkButton.textContent = "Link"), 1500);
  }

  step(by) {
    this.pause();
    this.go(this.at + by);
  }

  jump(direction) {
    this.pause();
    const kind = this.kind.value,
      wanted = this.run.events.filter(
        (event) =>
          (kind === "any event" || event.kind === kind) &&
          (this.follow < 0 || event.who === this.follow) &&
          (event.step - this.at) * direction > 0,
      );
    if (wanted.length) this.go(direction > 0 ? wanted[0].step : wanted[wanted.length - 1].step);
  }

  setFollow(who) {
    this.follow = who === this.follow ? -1 : who;
    this.select.value = String(this.follow);
    this.draw();
    this.address();
    const row = this.rows.get(this.follow);
    if (row) row.node.scrollIntoView({ block: "nearest" });
  }

  flip() {
    this.options.dark = !this.dark;
    this.repaint();
  }

  get dark() {
    if (this.options.dark !== undefined) return this.options.dark;
    return (this.around && isDark(this.around)) ?? this.scheme.matches;
  }

  get last() {
    return this.run.states.length - 1;
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typed = event.target.tagName,
      own = typed === "SELECT" || (typed === "INPUT" && event.key.startsWith("Arrow"));
    const acts = {
      " ": () => this.toggle(),
      ArrowLeft: () => this.step(-1),
      ArrowRight: () => this.step(1),
      Home: () => this.step(-this.at),
      End: () => this.step(this.last),
      n: () => this.jump(1),
      p: () => this.jump(-1),
      "+": () => this.faster(1),
      "-": () => this.faster(-1),
      f: () => this.nextFollow(),
      t: () => this.flip(),
      l: () => this.copyLink(),
    };
    if (
      own ||
      !(event.key in acts) ||
      (typed === "BUTTON" && event.key === " ") ||
      (event.key === " " && event.target.classList.contains("row"))
    )
      return;
    event.preventDefault();
    event.stopPropagation();
    acts[event.key]();
  }

  faster(by) {
    const options = [...this.rate.options],
      i = Math.max(0, Math.min(options.length - 1, this.rate.selectedIndex + by));
    this.rate.selectedIndex = i;
    this.speed = Number(options[i].value);
  }

  nextFollow() {
    const running = this.state.running;
    if (!running.length) return;
    const next = running.find((who) => who > this.follow);
    this.follow = -2;
    this.setFollow(next === undefined ? running[0] : next);
  }

  /** Take in a step as it happens. most: keep this many steps, and forget the oldest. */
  push(step, names = [], most = Infinity) {
    const atEnd = this.at >= this.last;
    this.live = true;
    this.run.append(step, names);
    const gone = this.run.trim(most);
    for (const who of gone.names) this.forget(who);
    this.still = null;
    this.at = Math.max(0, this.at - gone.steps);
    if (atEnd) this.at = this.last;
    // One picture per frame, however many steps came.
    if (this.due) return;
    this.due = requestAnimationFrame(() => {
      this.due = 0;
      this.draw();
    });
  }

  /** What stands there before the first step. */
  showIdle() {
    this.news.textContent = "Nothing has run yet. The player begins with the first request.";
  }

  /** Remove what the page has of a sequence that is long over. */
  forget(who) {
    const row = this.rows.get(who);
    if (row) row.node.remove();
    this.rows.delete(who);
    const option = [...this.select.options].find((entry) => Number(entry.value) === who);
    if (option) option.remove();
    if (this.follow === who) this.setFollow(who);
  }

  address() {
    const follow = this.follow >= 0 ? `&follow=${this.run.letters[this.follow]}` : "";
    try {
      history.replaceState(null, "", `#step=${this.at}${follow}`);
    } catch {
      /* a frame without an address of its own */
    }
  }

  go(step) {
    if (!this.run.states.length) return;
    this.at = Math.max(0, Math.min(this.last, Math.round(step)));
    this.draw();
    if (!this.playing) this.address();
  }

  /* --- drawing ------------------------------------------------------------------------------------- */

  repaint() {
    this.root.classList.toggle("dark", this.dark);
    if (this.options.wholePage)
      document.documentElement.style.colorScheme = this.dark ? "dark" : "light";
    const style = getComputedStyle(this.root);
    this.paint = Object.fromEntries(
      [
        "paper",
        "panel",
        "ink",
        "soft",
        "line",
        "free",
        "cached",
        "accent",
        "warn",
        "budget",
        "prompt",
        "decode",
        "again",
      ].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]),
    );
    this.still = null;
    if (this.run.states.length) this.draw();
  }

  get state() {
    return this.run.states[this.at];
  }

  draw() {
    const state = this.state;
    if (!state || !this.paint) return;
    this.slider.max = this.last;
    this.slider.value = this.at;
    this.slider.setAttribute("aria-valuetext", `step ${this.at} of ${this.last}`);
    this.counter.textContent = `step ${this.at} of ${this.last}`;
    this.news.textContent = this.said(state);
    this.drawRows(state);
    this.drawMemory(state);
    this.drawTimeline();
    if (!this.playing) {
      this.memory.setAttribute(
        "aria-label",
        `${this.memory.dataset.name}. ${this.memoryInWords(state)}`,
      );
      this.timeline.setAttribute(
        "aria-label",
        `${this.timeline.dataset.name}. Now ${this.counter.textContent}.`,
      );
    }
  }

  /** The step in words. */
  said(state) {
    const run = this.run,
      tokens = state.tokens.reduce((a, b) => a + b, 0),
      letters = (list) => list.map((who) => run.letters[who]).join(", ");
    const parts = [
      `${state.running.length} run, ${state.waiting.length} wait. ${tokens} of ${run.budget} tokens. ${run.blocks - state.free} of ${run.blocks} blocks in use, ${state.cached.size} cached.`,
    ];
    for (const event of run.events) {
      if (event.step !== this.at) continue;
      const who = run.letters[event.who];
      if (event.kind === "hit")
        parts.push(
          `${who} finds the first ${event.tokens} tokens of its prompt in the prefix cache, and shares their blocks.`,
        );
      else if (event.kind === "admission") parts.push(`${who} is admitted.`);
      else if (event.kind === "end")
        parts.push(`${who} ends; from the next step on, its blocks are free.`);
    }
    const before = run.states[this.at - 1];
    for (const who of state.preempted) {
      const lost = ((before && before.tables.get(who)) || []).length;
      parts.push(
        `No block was free for those before it: ${run.letters[who]}, which came last, is preempted. It gives up its ${lost} blocks, and will be computed again.`,
      );
    }
    return parts.join(" ");
  }

  memoryInWords(state) {
    return state.running
      .map(
        (who) =>
          `${this.run.letters[who]}: ${state.computed.get(who) || 0} tokens in blocks ${(state.tables.get(who) || []).join(", ")}`,
      )
      .join("; ");
  }

  doing(state, who) {
    const run = this.run,
      item = state.scheduled.find((entry) => entry[0] === who);
    if (state.preempted.includes(who)) return "preempted";
    const [guesses, right] = state.guesses.get(who) || [0, 0];
    if (item)
      return [
        `prompt: ${item[3]} tokens, from ${item[2]}`,
        `decodes token ${item[2] + 1}${guesses ? `, and verifies ${guesses} guesses: ${right} right` : ""}`,
        `computes ${item[3]} tokens again`,
      ][item[1]];
    if (state.running.includes(who)) return "runs, nothing computed in this step";
    if (state.waiting.includes(who))
      return `waits, number ${state.waiting.indexOf(who) + 1} in the queue`;
    return this.at >= run.endedAt[who] ? "finished" : "not here yet";
  }

  drawRows(state) {
    const run = this.run,
      shown = [...state.running, ...state.waiting];
    for (let who = run.first; who < run.names.length; who++)
      if (run.endedAt[who] <= this.at && !shown.includes(who)) shown.push(who);
    shown.forEach((who, place) => {
      let row = this.rows.get(who);
      if (!row) row = this.newRow(who);
      const length = state.lengths.get(who) || 0,
        fresh = state.fresh.has(who) ? state.fresh.get(who).length : 0;
      const text = run.texts[who].slice(0, length),
        ended = run.endedAt[who] <= this.at;
      const wrong = (state.guesses.get(who) || [0, 0, ""])[2];
      const what = `${this.doing(state, who)} · ${state.computed.get(who) || 0} tokens, ${(state.tables.get(who) || []).length} blocks`;
      const mark = `${what}|${wrong}|${length}|${fresh}|${this.follow === who}|${ended}`;
      if (row.mark !== mark) {
        row.mark = mark;
        row.what.textContent = ended ? "finished" : what;
        row.old.textContent = fromWord(text.slice(0, length - fresh), 300);
        row.fresh.textContent = text.slice(length - fresh);
        row.wrong.textContent = ended ? "" : wrong;
        row.node.setAttribute("aria-pressed", String(this.follow === who));
        row.node.classList.toggle("off", !state.running.includes(who));
      }
      if (this.list.children[place] !== row.node)
        this.list.insertBefore(row.node, this.list.children[place] || null);
    });
    while (this.list.children.length > shown.length) this.list.lastChild.remove();
  }

  newRow(who) {
    const make = this.make,
      run = this.run,
      ask = run.asks[who].replace(/\s+/g, " ").trim();
    const tag = make("span", { className: "tag", textContent: run.letters[who] });
    tag.style.background = run.colors[who];
    tag.style.color = inkOn(run.colors[who]);
    const row = {
      what: make("span", { className: "what" }),
      old: make("span"),
      fresh: make("span", { className: "new" }),
      wrong: make("s", { className: "wrong", title: "guesses that were wrong" }),
      mark: "",
    };
    const text = make(
      "div",
      { className: "text" },
      make(
        "div",
        {},
        make("span", { className: "ask", textContent: ask ? `${fromWord(ask, 70)} ` : "" }),
        row.old,
        row.fresh,
        row.wrong,
      ),
    );
    row.node = make(
      "li",
      {
        className: "row",
        tabIndex: 0,
        title: run.names[who],
        onclick: () => this.setFollow(who),
        onkeydown: (event) => {
          if (event.key === "Enter" || event.key === " ") {
            event.preventDefault();
            this.setFollow(who);
          }
        },
      },
      tag,
      row.what,
      text,
    );
    row.node.setAttribute("role", "button");
    row.node.setAttribute("aria-label", `Follow ${run.letters[who]}: ${fromWord(ask, 70)}`);
    this.rows.set(who, row);
    this.select.append(make("option", { value: who, textContent: `follow ${run.letters[who]}` }));
    return row;
  }

  /** A canvas context of this height in CSS pixels, sharp on any screen. */
  context(canvas, height) {
    const scale = window.devicePixelRatio || 1,
      width = canvas.clientWidth || 600;
    if (
      canvas.width !== Math.round(width * scale) ||
      canvas.height !== Math.round(height * scale)
    ) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
      canvas.style.height = `${height}px`;
    }
    const ctx = canvas.getContext("2d");
    ctx.setTransform(scale, 0, 0, scale, 0, 0);
    ctx.clearRect(0, 0, width, height);
    ctx.font = "11px system-ui, sans-serif";
    ctx.textBaseline = "middle";
    return [ctx, width];
  }

  /** Where the squares of the memory picture lie: a row for each running sequence, then the pool. */
  layout(state, width) {
    const run = this.run,
      longest = Math.max(1, ...state.running.map((who) => (state.tables.get(who) || []).length));
    const left = 26,
      cell = Math.max(4, Math.min(18, (width - left) / longest - 2)),
      rows = Math.max(run.seqs > 24 ? 24 : run.seqs, 1);
    const row = Math.max(9, Math.min(20, 240 / rows)),
      shown = state.running.slice(0, rows),
      top = rows * row + 34;
    const columns = Math.max(
        8,
        Math.min(
          run.blocks,
          Math.floor(width / Math.max(11, Math.sqrt((width * 170) / run.blocks))),
        ),
      ),
      size = width / columns;
    const high = Math.max(8, Math.min(size, 22)),
      height = top + Math.ceil(run.blocks / columns) * high + 4;
    return { left, cell, row, shown, top, columns, size, high, height };
  }

  drawMemory(state) {
    const run = this.run,
      canvas = this.memory,
      place = (this.place = this.layout(state, canvas.clientWidth || 600));
    const [ctx, width] = this.context(canvas, place.height),
      paint = this.paint,
      owners = run.owners(state),
      at = new Map();
    for (let block = 0; block < run.blocks; block++) {
      const x = (block % place.columns) * place.size,
        y = place.top + Math.floor(block / place.columns) * place.high;
      at.set(block, [x, y]);
    }
    this.drawLines(ctx, state, at);
    for (const [block, [x, y]] of at)
      this.square(
        ctx,
        state,
        block,
        owners.get(block) || [],
        x + 1,
        y + 1,
        place.size - 2,
        place.high - 2,
      );
    const label = `pool: ${run.blocks - state.free} in use, ${state.free - state.cached.size} free, ${state.cached.size} cached`;
    ctx.fillStyle = paint.panel;
    ctx.fillRect(0, place.top - 17, ctx.measureText(label).width + 4, 15);
    ctx.fillStyle = paint.soft;
    ctx.fillText(label, 0, place.top - 9);
    place.shown.forEach((who, i) => {
      const table = state.tables.get(who) || [],
        y = i * place.row;
      ctx.globalAlpha = this.follow >= 0 && this.follow !== who ? 0.45 : 1;
      ctx.fillStyle = paint.ink;
      ctx.fillText(run.letters[who], 2, y + place.row / 2);
      table.forEach((block, j) =>
        this.square(
          ctx,
          state,
          block,
          [who],
          place.left + j * (place.cell + 2),
          y + 1,
          place.cell,
          place.row - 3,
          j,
        ),
      );
      ctx.globalAlpha = 1;
    });
    if (state.running.length > place.shown.length) {
      ctx.fillStyle = paint.soft;
      ctx.fillText(
        `and ${state.running.length - place.shown.length} more`,
        width - 70,
        place.top - 9,
      );
    }
  }

  /** Lines from logical blocks to the pool: of the followed sequence, or faintly of all. */
  drawLines(ctx, state, at) {
    const { left, cell, row, shown, size } = this.place;
    shown.forEach((who, i) => {
      const all = this.follow < 0 && state.running.length <= MOST_WITH_LINES;
      if (this.follow !== who && !all) return;
      // The more sequences, the fainter their lines.
      ctx.globalAlpha = this.follow === who ? 1 : Math.max(0.15, 1 / state.running.length);
      ctx.strokeStyle = this.run.colors[who];
      ctx.lineWidth = this.follow === who ? 2 : 1.2;
      (state.tables.get(who) || []).forEach((block, j) => {
        const [x, y2] = at.get(block),
          x1 = left + j * (cell + 2) + cell / 2,
          x2 = x + size / 2,
          y1 = (i + 1) * row - 2;
        ctx.beginPath();
        ctx.moveTo(x1, y1);
        ctx.bezierCurveTo(x1, (y1 + y2) / 2, x2, (y1 + y2) / 2, x2, y2);
        ctx.stroke();
      });
    });
    ctx.globalAlpha = 1;
  }

  /** How many tokens of a block are computed, for a sequence that has it as its j-th. */
  filled(state, who, j) {
    return Math.max(0, Math.min(this.run.size, (state.computed.get(who) || 0) - j * this.run.size));
  }

  square(ctx, state, block, who, x, y, w, h, index) {
    const paint = this.paint,
      run = this.run;
    ctx.fillStyle = paint.free;
    ctx.fillRect(x, y, w, h);
    if (who.length) {
      const first = who.includes(this.follow) ? this.follow : who[0],
        j = index === undefined ? state.tables.get(first).indexOf(block) : index;
      ctx.globalAlpha *=
        index === undefined && this.follow >= 0 && !who.includes(this.follow) ? 0.4 : 1;
      ctx.fillStyle = run.colors[first];
      ctx.fillRect(x, y, (w * this.filled(state, first, j)) / run.size, h);
      if (index === undefined && w > 11 && h > 9) {
        ctx.fillStyle =
          this.filled(state, first, j) * 2 > run.size ? inkOn(run.colors[first]) : paint.ink;
        ctx.textAlign = "center";
        const label = who.length > 1 ? `×${who.length}` : run.letters[first];
        ctx.fillText(label, x + w / 2, y + h / 2 + 1);
        ctx.textAlign = "left";
      }
    } else if (state.cached.has(block)) {
      ctx.fillStyle = paint.cached;
      ctx.fillRect(x, y, w, h);
      ctx.strokeStyle = paint.free;
      ctx.lineWidth = 1.5;
      ctx.beginPath();
      for (let d = -h; d < w; d += 5) {
        ctx.moveTo(x + Math.max(0, d), y + Math.max(0, -d));
        ctx.lineTo(x + Math.min(w, d + h), y + Math.min(h, w - d));
      }
      ctx.stroke();
    }
    const shared = (run.owners(state).get(block) || []).length > 1;
    ctx.strokeStyle = shared ? paint.ink : paint.line;
    ctx.lineWidth = shared ? 2.5 : 1;
    ctx.strokeRect(x + 0.5, y + 0.5, w - 1, h - 1);
    if (shared && w > 7 && h > 7) {
      ctx.strokeStyle = paint.paper;
      ctx.lineWidth = 1;
      ctx.strokeRect(x + 2, y + 2, w - 4, h - 4);
    }
    ctx.globalAlpha = index === undefined ? 1 : ctx.globalAlpha;
  }

  /** The timeline's picture without the cursor; kept until data, size or theme change. */
  drawTimeline() {
    const run = this.run,
      n = run.states.length,
      rows = run.names.length - run.first,
      row = Math.max(3, Math.min(14, 260 / Math.max(1, rows)));
    const lanes = rows * row,
      strip = 56,
      height = lanes + 2 * (strip + 16) + 6,
      left = row >= 9 ? 24 : 4;
    const [ctx, width] = this.context(this.timeline, height),
      scale = window.devicePixelRatio || 1;
    this.axis = { left, width: width - left - 2, row, lanes, n };
    if (
      !this.still ||
      this.still.width !== this.timeline.width ||
      this.still.height !== this.timeline.height
    ) {
      this.still = document.createElement("canvas");
      this.still.width = this.timeline.width;
      this.still.height = this.timeline.height;
      const still = this.still.getContext("2d");
      still.scale(scale, scale);
      still.font = ctx.font;
      still.textBaseline = "middle";
      this.drawLanes(still);
      this.drawTokens(still, lanes + 14, strip);
      this.drawKv(still, lanes + 14 + strip + 16, strip);
    }
    ctx.drawImage(this.still, 0, 0, width, height);
    const x = left + ((this.at + 0.5) * this.axis.width) / n;
    ctx.strokeStyle = this.paint.ink;
    ctx.lineWidth = 1.5;
    ctx.beginPath();
    ctx.moveTo(x, 0);
    ctx.lineTo(x, height);
    ctx.stroke();
    if (this.follow >= 0) {
      ctx.strokeStyle = this.paint.accent;
      ctx.lineWidth = 1.5;
      ctx.strokeRect(0.5, (this.follow - run.first) * row, width - 1, row);
    }
  }

  drawLanes(ctx) {
    const { left, width, row, n } = this.axis,
      paint = this.paint,
      run = this.run,
      step = width / n;
    for (let who = run.first; who < run.lanes.length; who++) {
      const lane = run.lanes[who],
        y = (who - run.first) * row;
      if (row >= 9) {
        ctx.fillStyle = paint.ink;
        ctx.fillText(run.letters[who], 2, y + row / 2);
      }
      for (let i = 0; i < n;) {
        let j = i + 1;
        while (j < n && lane[j] === lane[i]) j++;
        const x = left + i * step,
          w = Math.max((j - i) * step - (step > 5 ? 0.6 : 0), 0.7);
        const part = {
          [WAIT]: [paint.soft, 0.16],
          [PROMPT]: [paint.prompt, 0.86],
          [TOKEN]: [paint.decode, 0.5],
          [REPEAT]: [paint.again, 0.86],
          [IDLE]: [paint.line, 0.5],
        }[lane[i]];
        if (part) {
          ctx.fillStyle = part[0];
          ctx.fillRect(x, y + (row * (1 - part[1])) / 2, w, row * part[1]);
        }
        i = j;
      }
    }
    ctx.strokeStyle = paint.warn;
    ctx.lineWidth = 2.5;
    for (const event of run.events)
      if (event.kind === "preemption" && event.who >= run.first) {
        const x = left + event.step * step,
          y = (event.who - run.first) * row;
        ctx.beginPath();
        ctx.moveTo(x, y);
        ctx.lineTo(x, y + row);
        ctx.stroke();
      }
  }

  drawTokens(ctx, top, high) {
    const { left, width, n } = this.axis,
      paint = this.paint,
      run = this.run,
      step = width / n;
    const most = Math.max(
      run.budget,
      ...run.states.map((state) => state.tokens[0] + state.tokens[1] + state.tokens[2]),
    );
    ctx.fillStyle = paint.soft;
    ctx.fillText(`tokens per step, at most ${run.budget}`, left, top - 6);
    run.states.forEach((state, i) => {
      let y = top + high;
      [
        [DECODE, paint.decode],
        [AGAIN, paint.again],
        [PREFILL, paint.prompt],
      ].forEach(([kind, color]) => {
        const h = (state.tokens[kind] * high) / most;
        y -= h;
        ctx.fillStyle = color;
        ctx.fillRect(left + i * step, y, Math.max(0.8, step - (step > 4 ? 0.6 : 0)), h);
      });
    });
    const y = top + high - (run.budget * high) / most;
    ctx.strokeStyle = paint.budget;
    ctx.lineWidth = 2;
    ctx.beginPath();
    ctx.moveTo(left, y);
    ctx.lineTo(left + width, y);
    ctx.stroke();
  }

  drawKv(ctx, top, high) {
    const { left, width, n } = this.axis,
      paint = this.paint,
      run = this.run,
      step = width / n,
      mb = (tokens) => (tokens * run.bytes) / 1e6;
    const used = run.states.map((state) => mb((run.blocks - state.free) * run.size)),
      whole = run.states.map((state) => mb(state.running.length * run.longest));
    const pool = mb(run.blocks * run.size),
      most = Math.max(pool, ...used) * 1.3,
      peak = Math.max(...whole);
    const note = peak > most ? `; ${peak.toPrecision(3)} MB if each reserved its whole length` : "";
    ctx.fillStyle = paint.soft;
    ctx.fillText(`KV memory in use, of ${pool.toPrecision(3)} MB${note}`, left, top - 6);
    const limit = top + high - (pool * high) / most;
    ctx.strokeStyle = paint.budget;
    ctx.lineWidth = 2;
    ctx.beginPath();
    ctx.moveTo(left, limit);
    ctx.lineTo(left + width, limit);
    ctx.stroke();
    ctx.fillStyle = paint.decode;
    used.forEach((value, i) =>
      ctx.fillRect(
        left + i * step,
        top + high - (value * high) / most,
        Math.max(0.8, step),
        (value * high) / most,
      ),
    );
    ctx.strokeStyle = paint.warn;
    ctx.lineWidth = 2;
    ctx.setLineDash([5, 4]);
    ctx.beginPath();
    whole.forEach((value, i) => {
      // What lies off the picture is said in words.
      if (value > most) return;
      const y = top + high - (value * high) / most + 1;
      ctx.moveTo(left + i * step, y);
      ctx.lineTo(left + (i + 1) * step, y);
    });
    ctx.stroke();
    ctx.setLineDash([]);
  }

  /* --- facts under the pointer --------------------------------------------------------------------- */

  spot(event, canvas) {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  blockAt(event) {
    const place = this.place,
      state = this.state,
      [x, y] = this.spot(event, this.memory);
    if (!place) return null;
    if (y >= place.top) {
      const block =
        Math.floor((y - place.top) / place.high) * place.columns + Math.floor(x / place.size);
      return block < this.run.blocks
        ? { block, who: this.run.owners(state).get(block) || [] }
        : null;
    }
    const who = place.shown[Math.floor(y / place.row)],
      j = Math.floor((x - place.left) / (place.cell + 2)),
      table = state.tables.get(who) || [];
    return who !== undefined && j >= 0 && j < table.length
      ? { block: table[j], who: [who], j }
      : null;
  }

  memoryTip(event) {
    const found = this.blockAt(event),
      state = this.state,
      run = this.run;
    if (!found) return "";
    const all = run.owners(state).get(found.block) || [],
      said = [`Block ${found.block}`];
    for (const who of all) {
      const j = state.tables.get(who).indexOf(found.block);
      said.push(
        `${run.letters[who]}: its block ${j}, ${this.filled(state, who, j)} of ${run.size} tokens`,
      );
    }
    if (!all.length)
      said.push(state.cached.has(found.block) ? "cached: free, and its content is known" : "free");
    if (all.length > 1) said.push(`shared by ${all.length}`);
    return said.join("\n");
  }

  timelineTip(event) {
    const [x, y] = this.spot(event, this.timeline),
      { left, width, row, lanes, n } = this.axis;
    const i = Math.max(0, Math.min(n - 1, Math.floor(((x - left) * n) / width))),
      state = this.run.states[i],
      who = this.run.first + Math.floor(y / row);
    if (y < lanes && who < this.run.names.length) {
      const words = [
        "not here yet",
        "waits",
        "tokens of its prompt",
        "decodes",
        "computed again",
        "runs, nothing computed",
        "finished",
      ];
      return `${this.run.letters[who]} in step ${i}: ${words[this.run.lanes[who][i] || 0]}`;
    }
    const [prompt, decode, again] = state.tokens;
    return `Step ${i}: ${prompt} tokens of prompts, ${decode} decodes, ${again} again\n${this.run.blocks - state.free} of ${this.run.blocks} blocks in use\nthe step took ${(state.duration * 1000).toPrecision(3)} ms`;
  }

  hint(event, text) {
    this.tip.hidden = !text;
    if (!text) return;
    this.tip.textContent = text;
    this.tip.style.left = `${Math.min(event.clientX + 14, innerWidth - this.tip.offsetWidth - 6)}px`;
    this.tip.style.top = `${Math.min(event.clientY + 14, innerHeight - this.tip.offsetHeight - 6)}px`;
  }

  scrub(event) {
    const [x] = this.spot(event, this.timeline),
      { left, width, n } = this.axis;
    this.go(Math.floor(((x - left) * n) / width));
  }
}
