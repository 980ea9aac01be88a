"""Openings of text with a form: code, tables, lists, data, and what somebody says first in a conversation."""

from __future__ import annotations

FORMS: dict[str, list[str]] = {
    "code": [
        "def {function}(", "def {function}(items):\n    \"\"\"", "class {Thing}:\n    def __init__(self",
        "import numpy as np\n\ndef {function}(", "# {function}.py\n", "function {function}(", "const {function} = (",
        "export default class {Thing} ", "public class {Thing} {{\n", "#include <stdio.h>\n\nint {function}(",
        "fn {function}(", "pub struct {Thing} {{\n", "package main\n\nfunc {function}(", "SELECT * FROM {thing}",
        "CREATE TABLE {thing} (\n", "#!/bin/bash\n\n# {function}\n", "<html>\n<head>\n<title>{Thing}</title>",
        "type {Thing} = {{\n", "def test_{function}():\n", "struct {Thing} {{\n", "let {function} =", "module {Thing}\n",
        "{function} <- function(", "async function {function}(", "from dataclasses import dataclass\n\n\n@dataclass\nclass {Thing}:",
        "template <typename T>\nclass {Thing} ", "interface {Thing} {{\n", "```python\ndef {function}(",
        "// {Thing}.java\n", "/* {function} */\n", "<div class=\"{thing}\">", ".{thing} {{\n  ", "object {Thing} extends",
        "{function} :: ", "(defn {function} [", "How do I write {function} in Python?\n\n```python\n", "FROM python:3.11\n# {thing}\n",
        "SELECT {thing}_id, COUNT(*) FROM", "print({function}(", ">>> {function}(", "Traceback (most recent call last):\n  File \"{function}.py\"",
    ],
    "table": [
        "| {First} | {Last} |", "| Year | {Subject} |\n|---|---|\n|", "| City | Population |\n|---|---|\n| {Place} |",
        "Name,Age,City\n{First} {Last},{two},{Place}\n", "id,name,price\n1,", "date;{place};{otherplace}\n", "Table {small}: {Subject}\n\n|",
        "| Dish | Time |\n|---|---|\n| {Dish} |", "{{\"name\": \"{First} {Last}\", \"city\": \"{Place}\",", "{{\"{thing}\": [", "<{thing}>\n  <name>{First}</name>",
        "{thing}:\n  name: {First}\n  ", "[{thing}]\nname =", "{Place}\t{two}\t", "Score | {Place} | {OtherPlace}\n", "- name: {Last}\n  role: {work}\n",
        "Opening hours\n\nMonday:", "Timetable {place} - {OtherPlace}\n\n06:", "2024-03-{day} INFO {function}:",
    ],
    "list": [
        "{Day} facts about {subject}\n\n1.", "Top {small} reasons to visit {place}:\n\n1.", "Shopping list for {dish}:\n-", "To do:\n- [ ]",
        "{Small} ways to {skill}\n\n1.", "Things to know about {subject}:\n\n-", "Books by {First} {Last}:\n\n-", "Checklist: {skill}\n\n-",
        "Advantages of {subject}:\n*", "Synonyms:", "Names for", "Questions to ask a {work}:\n1.", "Packing list:\n-", "Contents\n\n1. {Subject}\n2.",
        "See also\n\n*", "References\n\n[1] {Last},", "Words that rhyme with", "The planets:", "Countries in which", "Steps to {skill}:\n1)",
    ],
    "dialogue": [
        "User: Can you explain {subject}?\nAssistant:", "A: Have you ever been to {place}?\nB:", "Customer: I would like to return {product}.\nClerk:",
        "Teacher: What do you know about {subject}?\n{First}:", "{First}: Did you hear about {OtherFirst}?\n{OtherFirst}:", "Doctor: How can I help?\nPatient:",
        "Human: How do I {skill}?\n\nAI:", "{First}> hey, are you there\n", "[09:{two}] {First}: good morning\n", "- Hello?\n- ",
        "Mum: {First}, have you", "Caller:", "Waiter: Good evening.\nGuest: The {dish}, please.\n", "Journalist: Mr {Last},",
    ],
}  # fmt: skip

TURNS = [
    "What is {subject}?", "Explain {subject} to a ten-year-old.", "How do I {skill}?", "Give me a recipe for {dish}.",
    "Write a short story about a {work} in {place}.", "Write a Python function called {function}.", "Compare {subject} and {other}.",
    "Summarize the history of {place}.", "I want to {skill}. Where do I start?", "Write a poem about {subject}.",
    "What are the pros and cons of {subject}?", "Who was {First} {Last}?", "Plan a weekend in {place}.",
    "Write an email to {First} about {subject}.", "Give me five facts about {subject}.", "Translate 'good morning' into four languages.",
    "Help me write a review of {product}.", "What is the difference between {subject} and {other}?", "Tell me a joke about a {work}.",
    "How does {law} work?", "Is {place} a good place to live?", "Explain the rules of {sport}.", "What should I cook with leftover {dish}?",
    "Write a JavaScript class {Thing} with three methods.", "{First} has {day} apples and gives {small} away. How many are left?",
    "Make a table of three cities, among them {place}.", "Proofread this sentence: '{First} have went to {place}.'",
    "I feel tired lately. What could help?", "Suggest names for a shop that sells {product}.", "What happened in {place} in 19{two}?",
    "Draft a cover letter for a {work}.", "Describe {subject} in one sentence.", "List {small} books about {subject}.",
    "Can you recommend {product}?", "Write a dialogue between a {work} and a {otherwork}.", "What is {two} times {day}?",
    "Why is {subject} important?", "Write a SQL query that counts each {thing}.", "Give me a training plan for {sport}.",
    "Rewrite this politely: 'Send it now, {First}.'", "What questions should I ask a {work}?", "Hello! Can you help me?",
    "Create a quiz about {subject} with three questions.", "Explain step by step how to {skill}.", "What does a {work} do all day?",
]  # fmt: skip
"""What a user asks first, for teachers with a chat template."""
